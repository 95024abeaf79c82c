// A compressed matrix, one of a stack (docs/format.md).
//
// Buffers, the same in every kernel: 0 x, 1 values, 2 deltas, 3 prime table, 4 prime indices, 5 scales, 6 row pointers,
// 7 index (of a stack's layer, for each group of vectors), 8 bias, 9 the result, 10 parameters. On the unit manifold 3
// and 4 must be bound and are not read; so must 8 without a bias. 1, 2 and 4 begin at multiples of 16 bytes.
// Elements of x are counted in 32 bits, which saves instructions at every entry; metal_ops.Parameters refuses more.
#pragma once
#include <metal_stdlib>
using namespace metal;

// Entries that a lane takes at a time: 4, 8 or 16. More means wider loads and fewer prefix sums.
#ifndef LANE_ENTRIES
#define LANE_ENTRIES 8
#endif
#define LANE_WORDS (LANE_ENTRIES / 4)
#define SIMD_WIDTH 32
#define CHUNK (SIMD_WIDTH * LANE_ENTRIES)

// The same in every kernel; metal_ops.Parameters packs it.
struct Parameters {
    uint rows;
    uint columns;
    uint capacity;
    uint layers;
    uint vectors;
    uint groups;
    uint tile;
    uint parts;
    uint has_bias;
};

// One layer. `values`, `deltas` and `prime_indices` point to where the layer begins, rounded down to a multiple of 16
// entries: the layer's first entry is entry `shift` from there, and `limit` entries may be read.
struct Matrix {
    device const int8_t* values;
    device const uchar* deltas;
    device const ushort* prime_table;
    device const ushort* prime_indices;
    device const uint* row_pointers;
    uint capacity;
    uint columns;
    uint shift;
    uint limit;
};

// Entries [begin, end) counted like `Matrix::values`.
struct Row {
    uint begin;
    uint end;
};

static inline uint layer_of(device const int* index, uint group, uint layers) {
    return uint(clamp(index[group], 0, int(layers) - 1));
}

template <bool prime>
static inline Matrix matrix_of(device const int8_t* values, device const uchar* deltas,
                               device const ushort* prime_table, device const ushort* prime_indices,
                               device const uint* row_pointers, constant Parameters& p, uint layer) {
    ulong first = ulong(layer) * p.capacity;
    ulong from = first & ~ulong(15);
    ulong left = ulong(p.layers) * p.capacity - from;
    Matrix m;
    m.values = values + from;
    m.deltas = deltas + from;
    m.prime_table = prime_table;
    m.prime_indices = prime ? prime_indices + from : prime_indices;
    m.row_pointers = row_pointers + ulong(layer) * (p.rows + 1);
    m.capacity = p.capacity;
    m.columns = p.columns;
    m.shift = uint(first - from);
    m.limit = left < 0xffffffff ? uint(left) : 0xffffffff;
    return m;
}

// Inside the planes whatever the row pointers say, and empty in a matrix without columns.
static inline Row row_of(thread const Matrix& m, uint row) {
    uint begin = min(m.row_pointers[row], m.capacity);
    uint end = m.columns == 0 ? begin : max(begin, min(m.row_pointers[row + 1], m.capacity));
    Row r;
    r.begin = begin + m.shift;
    r.end = end + m.shift;
    return r;
}

// Exact in float32: |q * P[k]| < 2**24. Indices beyond 9999 read the last prime; from index 6542 on, primes have bit 16.
template <bool prime>
static inline float level_of(int q, uint k, device const ushort* prime_table) {
    if (!prime) return float(q);
    k = min(k, 9999u);
    return float(q * int(uint(prime_table[k]) + (k < 6542 ? 0u : 65536u)));
}

static inline float float32_of(float x) { return x; }
static inline float float32_of(half x) { return float(x); }
static inline float float32_of(ushort x) { return as_type<float>(uint(x) << 16); }  // bfloat16
