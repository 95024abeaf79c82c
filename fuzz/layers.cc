// A fuzz target for what reads a layer's planes: the decoder, both products, the checks and the conversions of an index, on
// one thread, with every set of kernels that this processor runs. An input becomes planes of exactly their length on the
// heap, so that AddressSanitizer sees any access outside; row pointers may be as bad as they can be. With valid row
// pointers all sets must decode to the same bits, products must agree with the decoded matrix, and checks and conversions
// with a plain reading of the rules.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "conversion_checks.h"
#include "dispatch.h"
#include "planes.h"
#include "verification.h"

namespace {

using upg::Index;

// Bytes of the input, then zeros.
class Input {
 public:
  Input(const std::uint8_t* data, size_t size) : data_(data), size_(size) {}
  size_t left() const { return size_; }
  std::uint8_t byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  std::uint16_t two() {
    const unsigned low = byte(), high = byte();
    return static_cast<std::uint16_t>(low | high << 8);
  }

 private:
  const std::uint8_t* data_;
  size_t size_;
};

struct Case : upg::Planes {
  bool valid_pointers;
  size_t alignment;  // of rows that are made of these

  explicit Case(Input& in) {
    const unsigned flags = in.byte();
    prime = flags & 1;
    valid_pointers = flags & 2;
    index = static_cast<Index>((flags >> 2) % 3);
    alignment = size_t{1} << (flags >> 5) % 4;
    scales.assign(1 + in.byte() % 16, 0.5f);
    columns = 1 + in.two() % 1200;
    for (size_t row = 0; row <= rows(); ++row) row_pointers.push_back(in.two());
    if (index == Index::kMask) {
      deltas.resize(rows() * row_bytes());
      for (std::uint8_t& byte : deltas) byte = in.byte();
    }
    const size_t capacity = in.left() / ((index == Index::kDelta8 ? 2 : 1) + (prime ? 2 : 0));
    for (size_t i = 0; i < capacity; ++i) {
      values.push_back(static_cast<std::int8_t>(in.byte()));
      if (index == Index::kDelta8) deltas.push_back(in.byte());
      if (prime) primes.push_back(in.two());
    }
    for (std::uint32_t& pointer : row_pointers) {
      // Bad ones reach from inside the planes to far beyond 2**31.
      pointer = valid_pointers ? static_cast<std::uint32_t>(pointer % (capacity + 1)) : pointer * 60000u;
    }
    if (valid_pointers) std::sort(row_pointers.begin(), row_pointers.end());
    fit();
  }
};

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s: %s\n", upg::kernels().name, what);
  std::abort();
}

// The bound of docs/design.md, widened for the decoded matrix's own rounding.
void expect_close(float got, double sum, double magnitude, size_t terms, const char* what) {
  const double bound = (4.0 * static_cast<double>(terms) + 16) * std::ldexp(1.0, -24) * magnitude;
  expect(std::abs(static_cast<double>(got) - sum) <= bound, what);
}

void check_products(const Case& p, const std::vector<float>& dense, const upg::Products& out,
                    const std::vector<float>& x, const std::vector<float>& g, size_t vectors) {
  Case positive = p;
  for (std::int8_t& q : positive.values) q = static_cast<std::int8_t>(q == -128 ? 127 : std::abs(q));
  const std::vector<float> magnitudes = upg::decode(positive, 1);
  const auto at = [&](const std::vector<float>& w, size_t row, size_t c) {
    return static_cast<double>(w[row * p.columns + c]);
  };
  for (size_t v = 0; v < vectors; ++v) {
    for (size_t row = 0; row < p.rows(); ++row) {
      double sum = 0, magnitude = 0;
      for (size_t c = 0; c < p.columns; ++c) {
        const double factor = static_cast<double>(x[v * p.columns + c]);
        sum += at(dense, row, c) * factor;
        magnitude += 1.01 * at(magnitudes, row, c) * std::abs(factor);  // -128 counts as 127
      }
      expect_close(out.forward[v * p.rows() + row], sum, magnitude, p.values.size(), "product");
    }
    for (size_t c = 0; c < p.columns; ++c) {
      double sum = 0, magnitude = 0;
      for (size_t row = 0; row < p.rows(); ++row) {
        const double factor = static_cast<double>(g[v * p.rows() + row]);
        sum += at(dense, row, c) * factor;
        magnitude += 1.01 * at(magnitudes, row, c) * std::abs(factor);
      }
      expect_close(out.transposed[v * p.columns + c], sum, magnitude, p.values.size(), "transposed product");
    }
  }
}

void check_index(const Case& p) {
  const auto expect_of = [](bool condition, const std::string& what) { expect(condition, what.c_str()); };
  if (!p.valid_pointers) {
    // Conversions need row pointers that were checked; checks do not.
    if (p.index == Index::kDelta8) upg::first_bad_row(p.layer(), upg::all_rows(p));
    if (p.index == Index::kMask) upg::first_bad_mask_row(p.layer(), upg::all_rows(p));
  } else if (p.index == Index::kMask) {
    upg::check_mask(p, "mask", expect_of);
  } else if (p.index == Index::kDense) {
    upg::check_dense_rows(p, p.alignment, "dense rows", expect_of);
  } else {
    upg::check_rules(p, "deltas", expect_of);
    const bool valid = first_row_against_the_rules(p) == p.rows() && first_row_outside(p) == p.rows();
    upg::check_conversions(p, p.alignment, valid, "deltas", expect_of);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, size_t size) {
  Input in(data, size);
  const size_t vectors = 1 + in.byte() % 70;
  const Case p(in);
  std::vector<float> x(vectors * p.columns), g(vectors * p.rows());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(static_cast<int>(i * 7919 % 255) - 127);
  for (size_t i = 0; i < g.size(); ++i) g[i] = static_cast<float>(static_cast<int>(i * 104729 % 255) - 127);
  std::vector<float> first;
  for (const upg::Kernels* kernels : upg::usable_kernels()) {
    upg::choose_kernels(kernels->name);
    const std::vector<float> dense = upg::decode(p, 1);
    const upg::Products out = upg::multiply(p, x.data(), g.data(), upg::Element::kFloat32, vectors, 1);
    if (first.empty()) first = dense;
    expect(std::memcmp(first.data(), dense.data(), dense.size() * sizeof(float)) == 0, "decode");
    if (p.valid_pointers) check_products(p, dense, out, x, g, vectors);
    if (p.index != Index::kDelta8) continue;  // no deltas to check
    const size_t outside = upg::kernels().first_row_outside(p.layer());
    expect(!p.valid_pointers || outside == first_row_outside(p), "first row outside");
  }
  check_index(p);
  return 0;
}
