// y = x @ W.T for many vectors: a simdgroup decodes a row once for VECTORS_PER_PASS of them.
//
// threadgroups: (ceil(rows / simdgroups), ceil(vectors / VECTORS_PER_PASS), groups); threads: a multiple of 32, along x.
// x (groups, vectors, columns), y float32 (groups, vectors, rows), bias float32 (layers, rows); the rest as in mdcsr.h.
#include "chunk.h"

#ifndef VECTORS_PER_PASS
#define VECTORS_PER_PASS 4
#endif

template <typename X, bool prime>
[[kernel]] void sparse_matvec_batch(device const X* x [[buffer(0)]],
                                    device const int8_t* values [[buffer(1)]],
                                    device const uchar* deltas [[buffer(2)]],
                                    device const ushort* prime_table [[buffer(3)]],
                                    device const ushort* prime_indices [[buffer(4)]],
                                    device const float* scales [[buffer(5)]],
                                    device const uint* row_pointers [[buffer(6)]],
                                    device const int* index [[buffer(7)]],
                                    device const float* bias [[buffer(8)]],
                                    device float* y [[buffer(9)]],
                                    constant Parameters& p [[buffer(10)]],
                                    uint3 group [[threadgroup_position_in_grid]],
                                    uint simd_index [[simdgroup_index_in_threadgroup]],
                                    uint simd_count [[simdgroups_per_threadgroup]],
                                    uint lane [[thread_index_in_simdgroup]]) {
    uint row_index = group.x * simd_count + simd_index;
    if (row_index >= p.rows) return;
    uint layer = layer_of(index, group.z, p.layers);
    Matrix m = matrix_of<prime>(values, deltas, prime_table, prime_indices, row_pointers, p, layer);
    uint first_vector = group.y * VECTORS_PER_PASS;
    ulong which = ulong(group.z) * p.vectors + first_vector;
    uint present = min(uint(VECTORS_PER_PASS), p.vectors - first_vector);
    Row row = row_of(m, row_index);
    float sums[VECTORS_PER_PASS];
    for (uint v = 0; v < VECTORS_PER_PASS; ++v) sums[v] = 0.0f;
    uint column = 0;
    for (uint first = first_chunk(row); first < row.end && column < p.columns; first += CHUNK) {
        Entries e;
        column = read_chunk<prime>(m, row, first, column, lane, e);
        for (uint v = 0; v < VECTORS_PER_PASS; ++v) {
            // Vectors beyond the last repeat it, so that the loop has a fixed length.
            uint offset = (uint(which) + min(v, present - 1)) * p.columns;
            for (uint j = 0; j < LANE_ENTRIES; ++j) {
                sums[v] = fma(e.levels[j], float32_of(x[offset + e.columns[j]]), sums[v]);
            }
        }
    }
    uint of_layer = layer * p.rows + row_index;
    for (uint v = 0; v < VECTORS_PER_PASS; ++v) {
        float scaled = simd_sum(sums[v]) * scales[of_layer];
        if (lane == 0 && v < present) {
            y[(which + v) * p.rows + row_index] = p.has_bias != 0 ? scaled + bias[of_layer] : scaled;
        }
    }
}

template [[host_name("sparse_matvec_batch_unit_float32")]] [[kernel]] decltype(sparse_matvec_batch<float, false>) sparse_matvec_batch<float, false>;
template [[host_name("sparse_matvec_batch_unit_float16")]] [[kernel]] decltype(sparse_matvec_batch<half, false>) sparse_matvec_batch<half, false>;
template [[host_name("sparse_matvec_batch_unit_bfloat16")]] [[kernel]] decltype(sparse_matvec_batch<ushort, false>) sparse_matvec_batch<ushort, false>;
template [[host_name("sparse_matvec_batch_prime_float32")]] [[kernel]] decltype(sparse_matvec_batch<float, true>) sparse_matvec_batch<float, true>;
template [[host_name("sparse_matvec_batch_prime_float16")]] [[kernel]] decltype(sparse_matvec_batch<half, true>) sparse_matvec_batch<half, true>;
template [[host_name("sparse_matvec_batch_prime_bfloat16")]] [[kernel]] decltype(sparse_matvec_batch<ushort, true>) sparse_matvec_batch<ushort, true>;
