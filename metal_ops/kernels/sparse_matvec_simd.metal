// y = x @ W.T, one simdgroup per row: the default for few vectors.
//
// threadgroups: (ceil(rows / (simdgroups * ROWS_PER_SIMDGROUP)), vectors, groups); threads: a multiple of 32, along x.
// x (groups, vectors, columns), y float32 (groups, vectors, rows), bias float32 (layers, rows); the rest as in mdcsr.h.
#include "row_sum.h"

#ifndef ROWS_PER_SIMDGROUP
#define ROWS_PER_SIMDGROUP 1
#endif

template <typename X, bool prime>
[[kernel]] void sparse_matvec_simd(device const X* x [[buffer(0)]],
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
    uint layer = layer_of(index, group.z, p.layers);
    Matrix m = matrix_of<prime>(values, deltas, prime_table, prime_indices, row_pointers, p, layer);
    ulong which = ulong(group.z) * p.vectors + group.y;
    uint offset = uint(which) * p.columns;
    for (uint r = 0; r < ROWS_PER_SIMDGROUP; ++r) {
        uint row_index = (group.x * ROWS_PER_SIMDGROUP + r) * simd_count + simd_index;
        if (row_index >= p.rows) return;
        Row row = row_of(m, row_index);
        float sum = simd_sum(row_sum<prime>(m, row, lane, x, offset));
        if (lane == 0) {
            uint of_layer = layer * p.rows + row_index;
            float scaled = sum * scales[of_layer];
            y[which * p.rows + row_index] = p.has_bias != 0 ? scaled + bias[of_layer] : scaled;
        }
    }
}

template [[host_name("sparse_matvec_simd_unit_float32")]] [[kernel]] decltype(sparse_matvec_simd<float, false>) sparse_matvec_simd<float, false>;
template [[host_name("sparse_matvec_simd_unit_float16")]] [[kernel]] decltype(sparse_matvec_simd<half, false>) sparse_matvec_simd<half, false>;
template [[host_name("sparse_matvec_simd_unit_bfloat16")]] [[kernel]] decltype(sparse_matvec_simd<ushort, false>) sparse_matvec_simd<ushort, false>;
template [[host_name("sparse_matvec_simd_prime_float32")]] [[kernel]] decltype(sparse_matvec_simd<float, true>) sparse_matvec_simd<float, true>;
template [[host_name("sparse_matvec_simd_prime_float16")]] [[kernel]] decltype(sparse_matvec_simd<half, true>) sparse_matvec_simd<half, true>;
template [[host_name("sparse_matvec_simd_prime_bfloat16")]] [[kernel]] decltype(sparse_matvec_simd<ushort, true>) sparse_matvec_simd<ushort, true>;
