// Runs every usable set of kernels against a plain loop over the entries, with and without threads, on valid planes and
// on garbage. Made for sanitizers and for emulators; prints what it ran and exits with 1 on the first mistake.
//
//   upg_driver [I/N]: every N-th case from the I-th on, where all take too long at once (I from 0)
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "attention_checks.h"
#include "conversion_checks.h"
#include "dispatch.h"
#include "execution_checks.h"
#include "half.h"
#include "matrices.h"
#include "narrow_checks.h"
#include "planes.h"
#include "verification.h"

namespace upg {
namespace {

[[noreturn]] void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

void expect(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

void check_products(const Planes& p, const Dense& dense, size_t vectors, Element element, const std::string& what) {
  const size_t rows = p.scales.size();
  const Bits x = random_vectors(vectors * p.columns, element), g = random_vectors(vectors * rows, element);
  const Products out = multiply(p, data(x), data(g), element, vectors, 1);
  const double unit = std::ldexp(1.0, -24);
  // Half the smallest subnormal, lost before a multiplication by the largest level: half-precision vectors may be tiny.
  const double underflow = std::ldexp(1.0, -150) * 128 * 104729;
  for (size_t v = 0; v < vectors; ++v) {
    for (size_t row = 0; row < rows; ++row) {
      double sum = 0, magnitude = 0;
      for (size_t c = 0; c < p.columns; ++c) {
        const double element_of_x = static_cast<double>(x.floats[v * p.columns + c]);
        sum += dense.weights[row * p.columns + c] * element_of_x;
        magnitude += dense.magnitudes[row * p.columns + c] * std::abs(element_of_x);
      }
      const double terms = p.row_pointers[row + 1] - p.row_pointers[row] + 2.0;
      const double error = std::abs(static_cast<double>(out.forward[v * rows + row]) - sum);
      expect(error <= (2 * terms + 1) * (unit * magnitude + underflow), what + ": product, row " + std::to_string(row));
    }
    for (size_t c = 0; c < p.columns; ++c) {
      double sum = 0, magnitude = 0;
      for (size_t row = 0; row < rows; ++row) {
        const double element_of_g = static_cast<double>(g.floats[v * rows + row]);
        sum += dense.weights[row * p.columns + c] * element_of_g;
        magnitude += dense.magnitudes[row * p.columns + c] * std::abs(element_of_g);
      }
      const double error = std::abs(static_cast<double>(out.transposed[v * p.columns + c]) - sum);
      const double terms = static_cast<double>(rows) + 12;
      expect(error <= (2 * terms + 1) * (unit * magnitude + underflow), what + ": transposed product, column " + std::to_string(c));
    }
  }
  const Products threaded = multiply(p, data(x), data(g), element, vectors, 3);
  expect(same_bits(out.forward, threaded.forward), what + ": threads");
  expect(same_bits(out.transposed, threaded.transposed), what + ": threads, transposed");
}

// Whether no other bfloat16 is nearer, and an equally near one is odd.
bool is_nearest(std::uint16_t rounded, float exact) {
  const auto error = [exact](int bits) {
    return std::abs(double{float_from_bfloat16(static_cast<std::uint16_t>(bits))} - double{exact});
  };
  for (const int other : {rounded - 1, rounded + 1}) {
    if (error(other) < error(rounded) || (error(other) == error(rounded) && rounded % 2 == 1)) return false;
  }
  return true;
}

void check_decode(const Planes& p, const Dense& dense, const std::string& what) {
  expect(same_bits(decode(p, 2), dense.rounded), what + ": decode");
  const std::vector<std::uint16_t> rounded = decode_to_bfloat16(p, 2);
  for (size_t i = 0; i < rounded.size(); ++i) {
    expect(is_nearest(rounded[i], dense.rounded[i]), what + ": decode to bfloat16, weight " + std::to_string(i));
  }
}

// Layers of a stack give the bits that they give alone, whatever follows a layer's entries; an index outside the stack
// is brought to its ends.
void check_stack(size_t rows, size_t columns, bool prime, size_t vectors, const std::string& what) {
  std::vector<Planes> layers;
  for (const double density : {0.1, 0.7, 0.3}) layers.push_back(random_planes(rows, columns, density, 1, prime));
  size_t capacity = 0;
  for (const Planes& p : layers) capacity = std::max(capacity, p.values.size());
  Planes all;
  for (Planes& p : layers) {
    while (p.values.size() < capacity + 3) add_entry(p, below(256), 1);
    all.values.insert(all.values.end(), p.values.begin(), p.values.end());
    all.deltas.insert(all.deltas.end(), p.deltas.begin(), p.deltas.end());
    all.primes.insert(all.primes.end(), p.primes.begin(), p.primes.end());
    all.scales.insert(all.scales.end(), p.scales.begin(), p.scales.end());
    all.row_pointers.insert(all.row_pointers.end(), p.row_pointers.begin(), p.row_pointers.end());
  }
  all.fit();
  Stack stack{all.layer(), layers.size(), nullptr, 4};
  stack.first.primes = prime ? all.primes.data() : nullptr;
  stack.first.rows = rows;
  stack.first.columns = columns;
  stack.first.capacity = capacity + 3;
  const std::int32_t index[] = {2, -2147483647 - 1, 1, 2147483647};
  stack.index = index;
  const Bits x = random_vectors(4 * vectors * columns, Element::kFloat32);
  const Bits g = random_vectors(4 * vectors * rows, Element::kFloat32);
  const Products together = multiply(stack, data(x), data(g), Element::kFloat32, vectors, 3);
  Products alone;
  for (size_t group = 0; group < 4; ++group) {
    const Products one =
        multiply(layers[std::min<size_t>(2, static_cast<size_t>(std::max(index[group], 0)))],
                      x.floats.data() + group * vectors * columns, g.floats.data() + group * vectors * rows,
                      Element::kFloat32, vectors, 1);
    alone.forward.insert(alone.forward.end(), one.forward.begin(), one.forward.end());
    alone.transposed.insert(alone.transposed.end(), one.transposed.begin(), one.transposed.end());
  }
  expect(same_bits(together.forward, alone.forward), what + ": stack");
  expect(same_bits(together.transposed, alone.transposed), what + ": stack, transposed");
}

void check_halves() {
  for (std::uint32_t h = 0; h < 65536; h += 8) {
    std::uint16_t in[8];
    float half[8];
    for (std::uint32_t j = 0; j < 8; ++j) in[j] = static_cast<std::uint16_t>(h + j);
    kernels().to_float(in, Element::kFloat16, half, 8);
    for (int j = 0; j < 8; ++j) {
      const float expected = float_from_half(in[j]);
      expect(half[j] == expected || (std::isnan(half[j]) && std::isnan(expected)), "float16 " + std::to_string(in[j]));
    }
  }
}

// Numbers cases, and makes each one's planes depend on its number alone.
class Cases {
 public:
  explicit Cases(const char* piece) {
    if (piece && (std::sscanf(piece, "%zu/%zu", &index_, &of_) != 2 || index_ >= of_)) fail("I/N needs I < N");
  }
  // Whether the next case is to run.
  bool next() {
    rng.seed(static_cast<unsigned>(20240229 + number_));
    const bool mine = number_++ % of_ == index_;
    ran_ += mine;
    return mine;
  }
  size_t number() const { return number_; }
  size_t ran() const { return ran_; }

 private:
  size_t index_ = 0, of_ = 1, number_ = 0, ran_ = 0;
};

void check_valid(size_t rows, size_t columns, double density, size_t alignment, bool prime, size_t number,
                 const std::string& name) {
  constexpr size_t counts[] = {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 130};
  const Planes deltas = random_planes(rows, columns, density, alignment, prime);
  const std::string shape = std::to_string(rows) + "x" + std::to_string(columns) + " at " + std::to_string(density);
  check_outside(deltas, name + shape, expect);
  expect(first_bad_row(deltas.layer(), all_rows(deltas)) == deltas.rows(), name + shape + ": a valid layer breaks no rule");
  check_rules_of_mutants(deltas, name + shape, expect);
  check_conversions(deltas, alignment, true, name + shape, expect);
  const Dense dense = plain_decode(deltas);
  for (const Planes& p : {deltas, as_mask(deltas), as_dense(deltas, alignment)}) {
    // Every index meets every number of vectors, in every type.
    const size_t count = counts[number % std::size(counts)];
    const Element element = static_cast<Element>((number / std::size(counts) + static_cast<size_t>(p.index)) % 3);
    const std::string what = name + "index " + std::to_string(static_cast<int>(p.index)) + ", " + shape;
    check_decode(p, dense, what);
    check_products(p, dense, count, element, what + ", " + std::to_string(count) + " vectors");
  }
}

void check_garbage(bool prime, Index index, const std::string& name) {
  const Planes valid = garbage(1 + below(9), 1 + below(900), below(300), true, prime, index);
  const Dense dense = plain_decode(valid);
  check_decode(valid, dense, name);
  if (index == Index::kDelta8) check_outside(valid, name, expect);
  if (index == Index::kDelta8) check_rules(valid, name, expect);
  if (index == Index::kDelta8) check_conversions(valid, 1, false, name, expect);
  if (index == Index::kMask) check_mask(valid, name, expect);
  if (index == Index::kDense) check_dense_rows(valid, size_t{1} << below(4), name, expect);
  check_products(valid, dense, 1 + below(20), Element::kFloat32, name);
  const Planes broken = garbage(1 + below(9), 1 + below(900), below(300), false, prime, index);
  const size_t vectors = 1 + below(20);
  const Bits x = random_vectors(vectors * broken.columns, Element::kFloat32);
  const Bits g = random_vectors(vectors * broken.rows(), Element::kFloat32);
  multiply(broken, data(x), data(g), Element::kFloat32, vectors, 2);
  if (index == Index::kDelta8) kernels().first_row_outside(broken.layer());
  if (index == Index::kDelta8) first_bad_row(broken.layer(), all_rows(broken));
  if (index == Index::kMask) first_bad_mask_row(broken.layer(), all_rows(broken));
  decode(broken, 2);
  decode_to_bfloat16(broken, 2);
}

}  // namespace
}  // namespace upg

int main(int argc, char** argv) {
  const size_t shapes[][2] = {{0, 5}, {5, 0}, {1, 1}, {1, 3}, {3, 1}, {33, 67}, {67, 33}, {20, 700}, {130, 300}};
  upg::Cases cases(argc > 1 ? argv[1] : nullptr);
  if (cases.next()) upg::check_execution(upg::expect);
  for (const upg::Kernels* kernels : upg::usable_kernels()) {
    upg::choose_kernels(kernels->name);
    if (cases.next()) upg::check_halves();
    for (size_t number = 0; number < 12; ++number) {
      if (cases.next()) upg::check_attention(number, upg::expect);
    }
    for (size_t number = 0; number < 60; ++number) {
      if (cases.next()) upg::check_narrow(number, upg::expect);
    }
    for (const bool prime : {false, true}) {
      const std::string name = std::string(kernels->name) + (prime ? " prime " : " unit ");
      size_t number = 0;
      for (const auto& shape : shapes) {
        for (const double density : {0.02, 0.25, 0.6, 1.0}) {
          for (const size_t alignment : {size_t{1}, size_t{8}}) {
            ++number;
            if (cases.next()) upg::check_valid(shape[0], shape[1], density, alignment, prime, number, name);
          }
        }
      }
      for (const size_t vectors : {1, 3, 4, 17, 70}) {
        if (cases.next()) upg::check_stack(33, 400, prime, vectors, name + std::to_string(vectors) + " vectors");
      }
      // A row longer than a workspace.
      for (int i = 0; i < 3; ++i) {
        if (!cases.next()) continue;
        const upg::Planes wide = upg::random_planes(6, 70001, 0.9, 1, prime);
        const upg::Planes p = i == 0 ? wide : i == 1 ? upg::as_mask(wide) : upg::as_dense(wide, 1);
        upg::check_products(p, upg::plain_decode(p), 17, upg::Element::kFloat32, name + "wide");
      }
      for (int i = 0; i < 60; ++i) {
        if (!cases.next()) continue;
        for (int j = 0; j < 5; ++j) upg::check_garbage(prime, static_cast<upg::Index>(i % 3), name + "garbage");
      }
    }
    std::printf("%s: ok, %zu of %zu cases so far\n", kernels->name, cases.ran(), cases.number());
    std::fflush(stdout);
  }
  return 0;
}
