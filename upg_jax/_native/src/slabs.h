// How several vectors lie in scratch memory: `features` runs of `width` floats, one float per vector.
//
// Vectors are padded with zeros to a multiple of 16 and cut into slabs of at most 64, so that one entry of a row meets
// 16 to 64 vectors in consecutive memory. A few vectors lie one after the other instead: taking them one by one costs
// less than padding them to 16. Where rows are read whole, a few vectors take turns every 64 features, the last ones
// followed by zeros: their places are then constants of the kernels. The layout depends on shapes only, never on the
// instruction set: the size of the scratch memory is part of the compiled program.
#pragma once

#include "layer.h"

namespace upg {

constexpr size_t kUnit = 16;
constexpr size_t kSlab = 64;
// Up to how many vectors are single where rows are gathered, and where rows are read whole.
constexpr size_t kSingleVectors = 3;
constexpr size_t kVectorsOfWholeRows = 8;
// A vector is followed by this many floats, which wide loads may touch and nothing depends on.
constexpr size_t kVectorSlack = 128;
constexpr size_t kAlignment = 64;

static inline size_t vector_stride(size_t features) { return round_up(features, kUnit) + kVectorSlack; }

static inline bool reads_whole_rows(const Layer& layer, size_t vectors) {
  return layer.index != Index::kDelta8 && !layer.primes && vectors <= kVectorsOfWholeRows;
}

static inline size_t packed_floats(size_t vectors, size_t features) {
  return vectors <= kSingleVectors ? vectors * vector_stride(features) : round_up(vectors, kUnit) * features;
}

static inline size_t floats_by_words(size_t vectors, size_t features) { return vectors * round_up(features, 64); }

struct Slab {
  size_t first;   // vector
  size_t width;   // a multiple of kUnit
  size_t offset;  // floats from the start of the packed vectors
};

template <size_t kValue>
struct Constant {
  static constexpr size_t value = kValue;
};

// Calls `use` with a slab's width in units as a compile-time constant.
template <class Use>
static inline void with_units(size_t width, Use use) {
  switch (width / kUnit) {
    case 1:
      return use(Constant<1>());
    case 2:
      return use(Constant<2>());
    case 3:
      return use(Constant<3>());
    default:
      return use(Constant<4>());
  }
}

static inline size_t slab_count(size_t vectors) { return (vectors + kSlab - 1) / kSlab; }

static inline Slab slab_at(size_t index, size_t vectors, size_t features) {
  const size_t first = index * kSlab;
  return {first, smaller(kSlab, round_up(vectors, kUnit) - first), first * features};
}

}  // namespace upg
