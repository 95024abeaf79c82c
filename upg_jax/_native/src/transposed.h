// G @ W for packed vectors: every entry adds a multiple of its row's run of floats to its column's run.
#pragma once

#include "slabs.h"
#include "tiles.h"

namespace upg {
namespace {

template <class Isa, size_t kUnits, size_t kStride>
inline void scatter(const std::uint32_t* columns, const float* levels, size_t n, const float* g, float scale,
                    float* y) {
  constexpr size_t kWides = kUnits * kUnit / Isa::kLanes;
  typename Isa::Wide scaled[kWides];
  for (size_t w = 0; w < kWides; ++w) {
    scaled[w] = Isa::wide_multiply(Isa::wide_broadcast(scale), Isa::wide_load(g + w * Isa::kLanes));
  }
  for (size_t i = 0; i < n; ++i) {
    float* at = y + columns[i] * (kStride * kUnit);
    const typename Isa::Wide level = Isa::wide_broadcast(levels[i]);
    for (size_t w = 0; w < kWides; ++w) {
      float* run = at + w * Isa::kLanes;
      Isa::wide_store(run, Isa::wide_multiply_add(level, scaled[w], Isa::wide_load(run)));
    }
  }
}

template <class Isa, size_t kStride>
inline void scatter_slab(const std::uint32_t* columns, const float* levels, size_t n, const float* g, float scale,
                         float* y) {
  constexpr size_t kUnits = kStride < Isa::kUnits ? kStride : Isa::kUnits;
  size_t unit = 0;
  for (; unit + kUnits <= kStride; unit += kUnits) {
    scatter<Isa, kUnits, kStride>(columns, levels, n, g + unit * kUnit, scale, y + unit * kUnit);
  }
  if constexpr (kStride % kUnits != 0) {
    scatter<Isa, kStride % kUnits, kStride>(columns, levels, n, g + unit * kUnit, scale, y + unit * kUnit);
  }
}

template <class Isa, bool kPrime>
inline void add_transposed_of(const Layer& layer, const float* g, float* y, size_t width, Range rows, Workspace& w) {
  const Blocks blocks(layer, width);
  for_tiles<Isa, kPrime>(layer, rows.begin, rows.end, blocks, w, [&](size_t row, size_t count, bool, bool) {
    with_units(width, [&](auto units) {
      walk_blocks(count, blocks, w, [&](size_t t, const std::uint32_t* columns, const float* levels, size_t n) {
        scatter_slab<Isa, units.value>(columns, levels, n, g + (row + t) * width, layer.scales[row + t], y);
      });
    });
  });
}

template <class Isa>
void add_transposed(const Layer& layer, const float* g, float* y, size_t width, Range rows, Workspace& w) {
  if (layer.primes) {
    add_transposed_of<Isa, true>(layer, g, y, width, rows, w);
  } else {
    add_transposed_of<Isa, false>(layer, g, y, width, rows, w);
  }
}

}  // namespace
}  // namespace upg
