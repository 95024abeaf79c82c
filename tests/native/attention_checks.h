// Attention at one position against a plain softmax in double, with hostile positions, lengths and numbers.
#pragma once

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "execution.h"
#include "half.h"
#include "plan.h"

namespace upg {

// A cache of random numbers in buffers of exactly its size, so that sanitizers see reads past any end.
class AttentionCase {
 public:
  AttentionCase(Attention shape, size_t layers, std::mt19937& random) : a_(shape), layers_(layers) {
    const size_t cache = layers * a_.batch * a_.kv_heads * a_.length * a_.dim;
    queries_ = draw(a_.batch * a_.heads * a_.dim, random);
    keys_ = draw(cache, random);
    values_ = draw(cache, random);
    positions_.resize(a_.batch);
    filled_.resize(a_.batch);
    a_.queries = queries_.bytes.data(), a_.keys = keys_.bytes.data(), a_.values = values_.bytes.data();
    a_.positions = positions_.data(), a_.filled = filled_.data();
    a_.layer = layers - 1;
  }

  // Every sequence has had `filled` positions, and its query is at `position`.
  std::vector<float> run(std::int32_t position, std::int32_t filled) {
    positions_.assign(a_.batch, position);
    filled_.assign(a_.batch, filled);
    std::vector<float> out(a_.batch * a_.heads * a_.dim);
    Execution(attention_plan(a_, out.data()), 1).work();
    return out;
  }

  std::vector<double> expected(std::int32_t position, std::int32_t filled) const {
    std::vector<double> out(a_.batch * a_.heads * a_.dim);
    for (size_t item = 0; item < a_.batch * a_.heads; ++item) {
      const size_t b = item / a_.heads, kv = item % a_.heads / (a_.heads / a_.kv_heads);
      const size_t first = ((a_.layer * a_.batch + b) * a_.kv_heads + kv) * a_.length;
      double total = 0;
      for (std::int64_t p = std::max<std::int64_t>(0, std::int64_t{filled} - static_cast<std::int64_t>(a_.length)); p < filled; ++p) {
        if (p > position || (a_.window && position - p >= a_.window)) continue;
        const size_t row = (first + static_cast<size_t>(p) % a_.length) * a_.dim;
        double score = 0;
        for (size_t d = 0; d < a_.dim; ++d) score += double{queries_.floats[item * a_.dim + d]} * keys_.floats[row + d];
        score *= a_.scale;
        if (a_.cap > 0) score = a_.cap * std::tanh(score / a_.cap);
        const double weight = std::exp(score);
        total += weight;
        for (size_t d = 0; d < a_.dim; ++d) out[item * a_.dim + d] += weight * values_.floats[row + d];
      }
      for (size_t d = 0; d < a_.dim; ++d) out[item * a_.dim + d] = total > 0 ? out[item * a_.dim + d] / total : 0;
    }
    return out;
  }

 private:
  struct Numbers {
    std::vector<char> bytes;
    std::vector<float> floats;
  };

  // In [-1, 1], of the element type.
  Numbers draw(size_t count, std::mt19937& random) const {
    Numbers n;
    const size_t size = a_.element == Element::kFloat32 ? 4 : 2;
    n.bytes.resize(count * size);
    n.floats.resize(count);
    for (size_t i = 0; i < count; ++i) {
      float x = std::uniform_real_distribution<float>(-1, 1)(random);
      std::uint32_t bits;
      __builtin_memcpy(&bits, &x, 4);
      if (size == 2) {
        // Any 16 bits will do that are a number below 2: sign, an exponent of about 1, a mantissa.
        const auto half = static_cast<std::uint16_t>((bits & 0x83ffu) | (a_.element == Element::kFloat16 ? 0x3800u : 0x3f00u));
        x = a_.element == Element::kFloat16 ? float_from_half(half) : float_from_bfloat16(half);
        __builtin_memcpy(n.bytes.data() + 2 * i, &half, 2);
      } else {
        __builtin_memcpy(n.bytes.data() + 4 * i, &x, 4);
      }
      n.floats[i] = x;
    }
    return n;
  }

  Attention a_;
  size_t layers_;
  Numbers queries_, keys_, values_;
  std::vector<std::int32_t> positions_, filled_;
};

template <class Expect>
void check_attention(size_t number, Expect expect) {
  constexpr Element elements[] = {Element::kFloat32, Element::kBFloat16, Element::kFloat16};
  constexpr size_t dims[] = {1, 7, 16, 64, 80, 512};
  constexpr std::int32_t extremes[] = {-2147483647 - 1, -1, 0, 1, 2147483647};
  std::mt19937 random(static_cast<unsigned>(number));
  Attention shape{};
  shape.element = elements[number % 3];
  shape.batch = 1 + number % 2;
  shape.kv_heads = 1 + number % 3;
  shape.heads = shape.kv_heads * (1 + number % 4);
  shape.length = 1 + number * 37 % 150;
  shape.dim = dims[number % 6];
  shape.scale = 1 / std::sqrt(static_cast<float>(shape.dim));
  shape.cap = number % 4 == 0 ? 2.0f : 0.0f;
  shape.window = number % 5 == 0 ? 20 : 0;
  AttentionCase attention(shape, 1 + number % 2, random);
  const auto length = static_cast<std::int32_t>(shape.length);
  for (const std::int32_t filled : {0, 1, length, length + 3, 5 * length}) {
    const std::vector<float> out = attention.run(filled - 1, filled);
    const std::vector<double> right = attention.expected(filled - 1, filled);
    for (size_t i = 0; i < out.size(); ++i) {
      // Scores stay below 4 * sqrt(dim) and values below 2; their roundings add up over `dim`.
      const double bound = 1e-7 * 2 * (32 + 8 * std::sqrt(static_cast<double>(shape.dim)) * 4);
      expect(std::fabs(out[i] - right[i]) <= bound, std::string(kernels().name) + " attention " + std::to_string(number));
    }
  }
  for (const std::int32_t position : extremes) {
    for (const std::int32_t filled : extremes) attention.run(position, filled);
  }
}

}  // namespace upg
