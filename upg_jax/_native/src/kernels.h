// The table of kernels that every instruction set provides. Plain C++; nothing here knows of XLA or of threads.
#pragma once

#include "layer.h"

namespace upg {

// Buffers that a kernel works in, one set per thread.
struct Workspace {
  static constexpr size_t kEntries = 32768;
  static constexpr size_t kRows = 32;
  static constexpr size_t kBlocks = 256;

  // Every row's entries start at a multiple of 8 and are followed by 8 to 15 entries of slack.
  static constexpr size_t kPaddedEntries = kEntries + 16 * kRows;
  alignas(64) std::uint32_t columns[kPaddedEntries];
  alignas(64) float levels[kPaddedEntries];
  alignas(64) float accumulators[kRows * 64];  // a tile's rows, or one row's slabs
  std::uint32_t starts[kRows + 1];
  std::uint32_t cuts[kRows * (kBlocks + 1)];
};

// One query position for each sequence of a batch, over one layer of a cache.
struct Attention {
  static constexpr size_t kMostDim = 512;

  const void* queries;  // (batch, heads, dim)
  const void* keys;     // (layers, batch, kv_heads, length, dim); position p lies at p % length
  const void* values;   // like keys
  Element element;      // of all three
  const std::int32_t* positions;  // (batch) of the queries
  const std::int32_t* filled;     // (batch) how many positions each sequence has had
  size_t layer;
  size_t batch;
  size_t heads;
  size_t kv_heads;
  size_t length;
  size_t dim;
  float scale;
  float cap;            // 0 for none
  std::int32_t window;  // positions that a query sees; 0 for all
};

// How many slots of a sequence hold a key.
static inline size_t slots_of(const Attention& a, size_t sequence) {
  return a.filled[sequence] > 0 ? smaller(static_cast<size_t>(a.filled[sequence]), a.length) : 0;
}

constexpr size_t kSlabsAtOnce = Workspace::kRows;
// Rows that the products of matrices take at a time.
constexpr size_t kMatrixRows = 32;

struct Kernels {
  const char* name;

  // y[r] = W[r] . x for `rows`, whose index is deltas or whose manifold is prime. `x` has kVectorSlack floats behind it
  // and is aligned to kAlignment.
  void (*product_with_vector)(const Layer&, const float* x, float* y, Range rows);
  // y[v * rows + r] for `rows` and up to kVectorsOfWholeRows vectors, packed by words (slabs.h); the index is a mask, or
  // dense, the manifold unit.
  void (*product_of_whole_rows)(const Layer&, const float* x, size_t vectors, float* y, Range rows);
  // y[v * rows + r] for `rows` and the vectors of `slabs` (at most kSlabsAtOnce), from packed `x` (slabs.h).
  void (*product)(const Layer&, const float* x, size_t vectors, float* y, Range slabs, Range rows, Workspace&);
  // The same for rows that are nearly full; their index is a mask, or dense, and their manifold is unit.
  void (*matrix_product)(const Layer&, const float* x, size_t vectors, float* y, Range slabs, Range rows, Workspace&);
  // As product_of_whole_rows, with values of fewer than 8 bits.
  void (*product_of_narrow)(const Layer&, const float* x, size_t vectors, float* y, Range rows);
  // y += g[rows] @ W[rows] for one vector; the index is deltas or the manifold is prime.
  void (*add_transposed_with_vector)(const Layer&, const float* g, float* y, Range rows);
  // The same for a slab of packed `g` into a packed slab of `y`, both `width` wide.
  void (*add_transposed)(const Layer&, const float* g, float* y, size_t width, Range rows, Workspace&);
  void (*add_transposed_matrix)(const Layer&, const float* g, float* y, size_t width, Range rows, Workspace&);
  // The same for up to kVectorsOfWholeRows vectors and what product_of_whole_rows takes: `g` is packed, `y` packed by words.
  void (*add_transposed_whole_rows)(const Layer&, const float* g, size_t vectors, float* y, Range rows);
  // The dense `rows`, the first of them at `out`: float32(level) * scale.
  void (*decode)(const Layer&, float* out, Range rows);
  // The first row of [0, rows) whose last column is not below `columns`, or rows.
  size_t (*first_row_outside)(const Layer&);
  void (*to_float)(const void* x, Element, float* out, size_t count);
  void (*to_bfloat16)(const float* x, std::uint16_t* out, size_t count);
  // The result (batch, heads, dim) of one query head: `item` counts them through the batch. 0 where it sees no key.
  void (*attend)(const Attention&, float* out, size_t item, Workspace&);
};

extern const Kernels kPortableKernels;
#ifdef UPG_HAVE_X86_KERNELS
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Vbmi2Kernels;
#endif
#ifdef UPG_HAVE_NEON_KERNELS
extern const Kernels kNeonKernels;
#endif

}  // namespace upg
