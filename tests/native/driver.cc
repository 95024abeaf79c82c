// Runs every usable set of kernels against a plain loop over the entries, with and without threads, on valid planes and
// on garbage. Made for sanitizers and for emulators; prints what it ran and exits with 1 on the first mistake.
//
//   upg_driver [I/N]: every N-th case from the I-th on, where all take too long at once (I from 0)
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention_checks.h"
#include "conversion.h"
#include "dispatch.h"
#include "execution_checks.h"
#include "half.h"
#include "planes.h"
#include "verification.h"

namespace {

using upg::Element;
using upg::Index;
using upg::Layer;
using upg::Planes;
using upg::Products;

std::mt19937 rng;

size_t below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(rng); }
float uniform() { return std::uniform_real_distribution<float>(-1, 1)(rng); }

std::vector<std::uint32_t> first_primes() {
  std::vector<std::uint32_t> found;
  for (std::uint32_t n = 2; found.size() < 10000; ++n) {
    bool prime = true;
    for (size_t i = 0; i < found.size() && found[i] * found[i] <= n && prime; ++i) prime = n % found[i] != 0;
    if (prime) found.push_back(n);
  }
  return found;
}

// The columns of a row's entries, in order; entries past their end have none, as have those of columns outside.
std::vector<size_t> columns_of(const Planes& p, size_t row) {
  std::vector<size_t> columns;
  const size_t begin = p.row_pointers[row], end = p.row_pointers[row + 1];
  if (p.index == Index::kMask) {
    for (size_t c = 0; c < p.columns && columns.size() < end - begin; ++c) {
      if (p.deltas[row * p.row_bytes() + c / 8] >> c % 8 & 1) columns.push_back(c);
    }
    return columns;
  }
  size_t column = 0;
  for (size_t i = begin; i < end; ++i) {
    column = p.index == Index::kDense ? i - begin : column + p.deltas[i];
    if (column >= p.columns) break;
    columns.push_back(column);
  }
  return columns;
}

void add_entry(Planes& p, size_t delta, int value) {
  p.deltas.push_back(static_cast<std::uint8_t>(delta));
  p.values.push_back(static_cast<std::int8_t>(value));
  p.primes.push_back(static_cast<std::uint16_t>(value ? below(10000) : 0));
}

Planes random_planes(size_t rows, size_t columns, double density, size_t alignment, bool prime) {
  Planes p;
  p.columns = columns;
  p.prime = prime;
  p.row_pointers.push_back(0);
  for (size_t row = 0; row < rows; ++row) {
    const double kept = row % 7 == 3 ? 0 : row % 7 == 5 ? 1 : density;
    size_t previous = 0;
    for (size_t c = 0; c < columns; ++c) {
      if (std::uniform_real_distribution<double>(0, 1)(rng) >= kept) continue;
      for (; c - previous > 255; previous += 255) add_entry(p, 255, 0);
      const int value = static_cast<int>(below(254)) - 127;
      add_entry(p, c - previous, value < 0 ? value : value + 1);
      previous = c;
    }
    while (p.values.size() % alignment) add_entry(p, 0, 0);
    p.row_pointers.push_back(static_cast<std::uint32_t>(p.values.size()));
    p.scales.push_back(0.01f + std::abs(uniform()));
  }
  p.fit();
  return p;
}

// The same matrix as a mask.
Planes as_mask(Planes p) {
  std::vector<std::uint8_t> mask(p.scales.size() * p.row_bytes());
  for (size_t row = 0; row < p.scales.size(); ++row) {
    size_t last = p.row_pointers[row + 1];
    while (last > p.row_pointers[row] && p.deltas[last - 1] == 0 && p.values[last - 1] == 0) --last;
    const std::vector<size_t> columns = columns_of(p, row);
    for (size_t i = 0; i < last - p.row_pointers[row]; ++i) {
      std::uint8_t& byte = mask[row * p.row_bytes() + columns[i] / 8];
      byte = static_cast<std::uint8_t>(byte | 1 << columns[i] % 8);
    }
  }
  p.deltas = mask;
  p.index = Index::kMask;
  return p;
}

// The same matrix with an entry for every column, rows padded to the alignment.
Planes as_dense(const Planes& p, size_t alignment) {
  Planes d;
  d.columns = p.columns;
  d.prime = p.prime;
  d.scales = p.scales;
  d.index = Index::kDense;
  const size_t stride = (p.columns + alignment - 1) / alignment * alignment;
  d.values.resize(p.scales.size() * stride);
  d.primes.resize(d.values.size());
  d.row_pointers.push_back(0);
  for (size_t row = 0; row < p.scales.size(); ++row) {
    const std::vector<size_t> columns = columns_of(p, row);
    for (size_t i = 0; i < columns.size(); ++i) {
      const size_t from = p.row_pointers[row] + i;
      if (!p.values[from]) continue;
      d.values[row * stride + columns[i]] = p.values[from];
      d.primes[row * stride + columns[i]] = p.primes[from];
    }
    d.row_pointers.push_back(static_cast<std::uint32_t>((row + 1) * stride));
  }
  d.fit();
  return d;
}

// `sorted` row pointers are valid; others are as bad as they can be.
Planes garbage(size_t rows, size_t columns, size_t capacity, bool sorted, bool prime, Index index) {
  Planes p;
  p.columns = columns;
  p.prime = prime;
  p.index = index;
  for (size_t i = 0; i < capacity; ++i) {
    p.values.push_back(static_cast<std::int8_t>(below(256)));
    p.primes.push_back(static_cast<std::uint16_t>(below(65536)));
  }
  const size_t index_bytes[] = {capacity, rows * p.row_bytes(), 0};
  const bool sparse = below(2) == 0;
  for (size_t i = 0; i < index_bytes[static_cast<size_t>(index)]; ++i) {
    p.deltas.push_back(static_cast<std::uint8_t>(sparse ? below(256) & below(256) & below(256) : below(256)));
  }
  for (size_t row = 0; row <= rows; ++row) {
    const size_t pointer = sorted ? below(capacity + 1) : below(std::size_t{1} << 32);
    p.row_pointers.push_back(static_cast<std::uint32_t>(pointer));
  }
  if (sorted) std::sort(p.row_pointers.begin(), p.row_pointers.end());
  p.scales.assign(rows, 0.5f);
  p.fit();
  return p;
}

struct Dense {
  std::vector<double> weights, magnitudes;
  std::vector<float> rounded;
};

Dense plain_decode(const Planes& p) {
  static const std::vector<std::uint32_t> primes = first_primes();
  const size_t rows = p.scales.size();
  Dense d{std::vector<double>(rows * p.columns), std::vector<double>(rows * p.columns),
          std::vector<float>(rows * p.columns)};
  for (size_t row = 0; row < rows; ++row) {
    const std::vector<size_t> columns = columns_of(p, row);
    for (size_t j = 0; j < columns.size(); ++j) {
      const size_t i = p.row_pointers[row] + j, column = columns[j];
      const size_t k = p.primes[i] < 9999 ? p.primes[i] : 9999;
      const double level = p.values[i] * (p.prime ? static_cast<double>(primes[k]) : 1.0);
      d.weights[row * p.columns + column] += level * p.scales[row];
      d.magnitudes[row * p.columns + column] += std::abs(level) * p.scales[row];
      d.rounded[row * p.columns + column] += static_cast<float>(level);
    }
    for (size_t c = 0; c < p.columns; ++c) d.rounded[row * p.columns + c] *= p.scales[row];
  }
  return d;
}

[[noreturn]] void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

void expect(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

struct Bits {
  std::vector<std::uint16_t> halves;
  std::vector<float> floats;
};

// Random numbers of a type, and the same as floats.
Bits random_vectors(size_t count, Element element) {
  Bits b;
  for (size_t i = 0; i < count; ++i) {
    if (element == Element::kFloat32) {
      b.floats.push_back(uniform());
      continue;
    }
    // Any number of magnitude below 2, in either format.
    const auto bits = static_cast<std::uint16_t>(below(2) << 15 | below(0x4000));
    b.halves.push_back(bits);
    b.floats.push_back(element == Element::kFloat16 ? upg::float_from_half(bits) : upg::float_from_bfloat16(bits));
  }
  return b;
}

const void* data(const Bits& b) {
  return b.halves.empty() ? static_cast<const void*>(b.floats.data()) : static_cast<const void*>(b.halves.data());
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

void check_products(const Planes& p, const Dense& dense, size_t vectors, Element element, const std::string& what) {
  const size_t rows = p.scales.size();
  const Bits x = random_vectors(vectors * p.columns, element), g = random_vectors(vectors * rows, element);
  const Products out = upg::multiply(p, data(x), data(g), element, vectors, 1);
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
  const Products threaded = upg::multiply(p, data(x), data(g), element, vectors, 3);
  expect(same_bits(out.forward, threaded.forward), what + ": threads");
  expect(same_bits(out.transposed, threaded.transposed), what + ": threads, transposed");
}

// Whether no other bfloat16 is nearer, and an equally near one is odd.
bool is_nearest(std::uint16_t rounded, float exact) {
  const auto error = [exact](int bits) {
    return std::abs(double{upg::float_from_bfloat16(static_cast<std::uint16_t>(bits))} - double{exact});
  };
  for (const int other : {rounded - 1, rounded + 1}) {
    if (error(other) < error(rounded) || (error(other) == error(rounded) && rounded % 2 == 1)) return false;
  }
  return true;
}

void check_decode(const Planes& p, const Dense& dense, const std::string& what) {
  expect(same_bits(upg::decode(p, 2), dense.rounded), what + ": decode");
  const std::vector<std::uint16_t> rounded = upg::decode_to_bfloat16(p, 2);
  for (size_t i = 0; i < rounded.size(); ++i) {
    expect(is_nearest(rounded[i], dense.rounded[i]), what + ": decode to bfloat16, weight " + std::to_string(i));
  }
}

void check_outside(const Planes& p, const std::string& what) {
  expect(upg::kernels().first_row_outside(p.layer()) == first_row_outside(p), what + ": first row outside");
}

void check_rules(const Planes& p, const std::string& what) {
  expect(upg::first_bad_row(p.layer()) == first_row_against_the_rules(p), what + ": first row against the rules");
}

// Valid planes, one entry of which is anything.
void check_rules_of_mutants(Planes p, const std::string& what) {
  check_rules(p, what);
  if (p.values.empty()) return;
  constexpr int telling[] = {0, 1, 254, 255};
  for (int i = 0; i < 20; ++i) {
    const size_t at = below(p.values.size());
    Planes mutant = p;
    if (below(2)) mutant.values[at] = static_cast<std::int8_t>(below(3) - 1);
    if (below(2)) mutant.deltas[at] = static_cast<std::uint8_t>(telling[below(4)]);
    if (below(4) == 0) mutant.primes[at] = static_cast<std::uint16_t>(9999 + below(2));
    check_rules(mutant, what);
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
  upg::Stack stack{all.layer(), layers.size(), nullptr, 4};
  stack.first.primes = prime ? all.primes.data() : nullptr;
  stack.first.rows = rows;
  stack.first.columns = columns;
  stack.first.capacity = capacity + 3;
  const std::int32_t index[] = {2, -2147483647 - 1, 1, 2147483647};
  stack.index = index;
  const Bits x = random_vectors(4 * vectors * columns, Element::kFloat32);
  const Bits g = random_vectors(4 * vectors * rows, Element::kFloat32);
  const Products together = upg::multiply(stack, data(x), data(g), Element::kFloat32, vectors, 3);
  Products alone;
  for (size_t group = 0; group < 4; ++group) {
    const Products one =
        upg::multiply(layers[std::min<size_t>(2, static_cast<size_t>(std::max(index[group], 0)))],
                      x.floats.data() + group * vectors * columns, g.floats.data() + group * vectors * rows,
                      Element::kFloat32, vectors, 1);
    alone.forward.insert(alone.forward.end(), one.forward.begin(), one.forward.end());
    alone.transposed.insert(alone.transposed.end(), one.transposed.begin(), one.transposed.end());
  }
  expect(same_bits(together.forward, alone.forward), what + ": stack");
  expect(same_bits(together.transposed, alone.transposed), what + ": stack, transposed");
}

// Packs and unpacks; `valid` planes come back as they were.
void check_conversions(const Planes& p, size_t alignment, bool valid, const std::string& what) {
  const size_t rows = p.scales.size(), stride = (p.columns + alignment - 1) / alignment * alignment;
  Planes mask = p, back = p;
  mask.index = Index::kMask;
  mask.deltas.assign(rows * p.row_bytes(), 0);
  back.deltas.assign(p.deltas.size(), 0);
  // Garbage may have entries before the first row and after the last one, which are nobody's.
  const size_t first = p.row_pointers[0], used = p.row_pointers[rows];
  const auto same = [&](const auto& a, const auto& b) {
    return std::equal(a.begin() + first, a.begin() + used, b.begin() + first);
  };
  const bool packed = upg::mask_from_deltas(p.layer(), mask.deltas.data()) == rows;
  if (packed) {
    expect(upg::first_bad_mask_row(mask.layer()) == rows, what + ": check of a mask");
    expect(upg::deltas_from_mask(mask.layer(), back.deltas.data()) == rows && same(back.deltas, p.deltas), what + ": unpack");
  }
  if (valid) expect(packed && mask.deltas == as_mask(p).deltas, what + ": pack");
  std::vector<std::int8_t> values(rows * stride);
  std::vector<std::uint16_t> primes(rows * stride);
  const Layer layer = p.layer();
  const bool spread = upg::dense_from_deltas(layer, stride, alignment, values.data(), primes.data()) == rows;
  if (!spread) return;
  const Layer dense = {values.data(),          nullptr, p.prime ? primes.data() : nullptr, nullptr,
                       p.row_pointers.data(), rows,    p.columns,                          values.size(),
                       Index::kDense};
  std::vector<std::uint32_t> lengths(rows);
  upg::row_lengths_of_dense(dense, stride, alignment, lengths.data());
  for (size_t row = 0; row < rows; ++row) {
    expect(lengths[row] == p.row_pointers[row + 1] - p.row_pointers[row], what + ": lengths of rows");
  }
  back.values.assign(p.values.size(), 0);
  back.deltas.assign(p.deltas.size(), 0);
  back.primes.assign(p.primes.size(), 0);
  upg::deltas_from_dense(dense, stride, p.row_pointers.data(), back.values.data(), back.deltas.data(),
                         back.primes.data());
  expect(same(back.values, p.values) && same(back.deltas, p.deltas) && (!p.prime || same(back.primes, p.primes)),
         what + ": dense rows back");
}

void check_halves() {
  for (std::uint32_t h = 0; h < 65536; h += 8) {
    std::uint16_t in[8];
    float half[8];
    for (std::uint32_t j = 0; j < 8; ++j) in[j] = static_cast<std::uint16_t>(h + j);
    upg::kernels().to_float(in, Element::kFloat16, half, 8);
    for (int j = 0; j < 8; ++j) {
      const float expected = upg::float_from_half(in[j]);
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
  check_outside(deltas, name + shape);
  expect(upg::first_bad_row(deltas.layer()) == deltas.rows(), name + shape + ": a valid layer breaks no rule");
  check_rules_of_mutants(deltas, name + shape);
  check_conversions(deltas, alignment, true, name + shape);
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
  if (index == Index::kDelta8) check_outside(valid, name);
  if (index == Index::kDelta8) check_rules(valid, name);
  if (index == Index::kDelta8) check_conversions(valid, 1, false, name);
  if (index == Index::kMask) {
    std::vector<std::uint8_t> deltas(valid.values.size());
    upg::deltas_from_mask(valid.layer(), deltas.data());
  }
  check_products(valid, dense, 1 + below(20), Element::kFloat32, name);
  const Planes broken = garbage(1 + below(9), 1 + below(900), below(300), false, prime, index);
  const size_t vectors = 1 + below(20);
  const Bits x = random_vectors(vectors * broken.columns, Element::kFloat32);
  const Bits g = random_vectors(vectors * broken.rows(), Element::kFloat32);
  upg::multiply(broken, data(x), data(g), Element::kFloat32, vectors, 2);
  if (index == Index::kDelta8) upg::kernels().first_row_outside(broken.layer());
  if (index == Index::kDelta8) upg::first_bad_row(broken.layer());
  upg::decode(broken, 2);
  upg::decode_to_bfloat16(broken, 2);
}

}  // namespace

int main(int argc, char** argv) {
  const size_t shapes[][2] = {{0, 5}, {5, 0}, {1, 1}, {1, 3}, {3, 1}, {33, 67}, {67, 33}, {20, 700}, {130, 300}};
  Cases cases(argc > 1 ? argv[1] : nullptr);
  if (cases.next()) upg::check_execution(expect);
  for (const upg::Kernels* kernels : upg::usable_kernels()) {
    upg::choose_kernels(kernels->name);
    if (cases.next()) check_halves();
    for (size_t number = 0; number < 12; ++number) {
      if (cases.next()) upg::check_attention(number, expect);
    }
    for (const bool prime : {false, true}) {
      const std::string name = std::string(kernels->name) + (prime ? " prime " : " unit ");
      size_t number = 0;
      for (const auto& shape : shapes) {
        for (const double density : {0.02, 0.25, 0.6, 1.0}) {
          for (const size_t alignment : {size_t{1}, size_t{8}}) {
            ++number;
            if (cases.next()) check_valid(shape[0], shape[1], density, alignment, prime, number, name);
          }
        }
      }
      for (const size_t vectors : {1, 3, 4, 17, 70}) {
        if (cases.next()) check_stack(33, 400, prime, vectors, name + std::to_string(vectors) + " vectors");
      }
      // A row longer than a workspace.
      for (int i = 0; i < 3; ++i) {
        if (!cases.next()) continue;
        const Planes wide = random_planes(6, 70001, 0.9, 1, prime);
        const Planes p = i == 0 ? wide : i == 1 ? as_mask(wide) : as_dense(wide, 1);
        check_products(p, plain_decode(p), 17, Element::kFloat32, name + "wide");
      }
      for (int i = 0; i < 60; ++i) {
        if (!cases.next()) continue;
        for (int j = 0; j < 5; ++j) check_garbage(prime, static_cast<Index>(i % 3), name + "garbage");
      }
    }
    std::printf("%s: ok, %zu of %zu cases so far\n", kernels->name, cases.ran(), cases.number());
    std::fflush(stdout);
  }
  return 0;
}
