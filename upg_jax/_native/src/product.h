// W @ X for packed vectors: every entry multiplies a run of 16 to 64 floats held in registers.
//
// Skipping zeros beats decoding to dense and multiplying at every density below about 0.9: one load and one
// multiplication per entry and register keep both busy.
#pragma once

#include "slabs.h"
#include "tiles.h"

namespace upg {
namespace {

// accumulators += levels * x[columns] for kUnits * 16 floats of a slab that is kStride units wide.
template <class Isa, size_t kUnits, size_t kStride>
inline void accumulate(const std::uint32_t* columns, const float* levels, size_t n, const float* x,
                       float* accumulators) {
  constexpr size_t kWides = kUnits * kUnit / Isa::kLanes;
  // Enough independent sums to hide the latency of a multiply-add.
  constexpr size_t kChains = kWides >= 4 ? 1 : 4 / kWides;
  typename Isa::Wide sums[kChains][kWides];
  for (size_t w = 0; w < kWides; ++w) {
    sums[0][w] = Isa::wide_load(accumulators + w * Isa::kLanes);
    for (size_t chain = 1; chain < kChains; ++chain) sums[chain][w] = Isa::wide_zero();
  }
  const auto add = [&](size_t i, size_t chain) {
    const float* at = x + columns[i] * (kStride * kUnit);
    const typename Isa::Wide level = Isa::wide_broadcast(levels[i]);
    for (size_t w = 0; w < kWides; ++w) {
      sums[chain][w] = Isa::wide_multiply_add(level, Isa::wide_load(at + w * Isa::kLanes), sums[chain][w]);
    }
  };
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (size_t j = 0; j < 4; ++j) add(i + j, j % kChains);
  }
  for (; i < n; ++i) add(i, 0);
  for (size_t w = 0; w < kWides; ++w) {
    for (size_t chain = 1; chain < kChains; ++chain) sums[0][w] = Isa::wide_add(sums[0][w], sums[chain][w]);
    Isa::wide_store(accumulators + w * Isa::kLanes, sums[0][w]);
  }
}

template <class Isa, size_t kStride>
inline void accumulate_slab(const std::uint32_t* columns, const float* levels, size_t n, const float* x,
                            float* accumulators) {
  constexpr size_t kUnits = kStride < Isa::kUnits ? kStride : Isa::kUnits;
  size_t unit = 0;
  for (; unit + kUnits <= kStride; unit += kUnits) {
    accumulate<Isa, kUnits, kStride>(columns, levels, n, x + unit * kUnit, accumulators + unit * kUnit);
  }
  if constexpr (kStride % kUnits != 0) {
    accumulate<Isa, kStride % kUnits, kStride>(columns, levels, n, x + unit * kUnit, accumulators + unit * kUnit);
  }
}

template <class Isa, bool kPrime>
inline void product_of(const Layer& layer, const float* x, size_t vectors, float* y, Range slabs, Range rows,
                       Workspace& w) {
  const Blocks blocks(layer, smaller(kSlab, round_up(vectors, kUnit)));
  for_tiles<Isa, kPrime>(layer, rows.begin, rows.end, blocks, w, [&](size_t row, size_t count, bool first, bool last) {
    for (size_t s = slabs.begin; s < slabs.end; ++s) {
      const Slab slab = slab_at(s, vectors, layer.columns);
      // A tile of one row may be a piece of it, so each slab keeps its sums until the last piece.
      float* sums = w.accumulators + (count == 1 ? (s - slabs.begin) * kSlab : 0);
      if (first) {
        for (size_t i = 0; i < count * slab.width; ++i) sums[i] = 0;
      }
      with_units(slab.width, [&](auto units) {
        walk_blocks(count, blocks, w, [&](size_t t, const std::uint32_t* columns, const float* levels, size_t n) {
          accumulate_slab<Isa, units.value>(columns, levels, n, x + slab.offset, sums + t * slab.width);
        });
      });
      if (!last) continue;
      const size_t present = smaller(slab.width, vectors - slab.first);
      for (size_t v = 0; v < present; ++v) {
        float* out = y + (slab.first + v) * layer.rows + row;
        for (size_t t = 0; t < count; ++t) out[t] = sums[t * slab.width + v] * layer.scales[row + t];
      }
    }
  });
}

template <class Isa>
void product(const Layer& layer, const float* x, size_t vectors, float* y, Range slabs, Range rows, Workspace& w) {
  if (layer.primes) {
    product_of<Isa, true>(layer, x, vectors, y, slabs, rows, w);
  } else {
    product_of<Isa, false>(layer, x, vectors, y, slabs, rows, w);
  }
}

}  // namespace
}  // namespace upg
