// y = x @ W.T, one thread per row: the plainest kernel, for rows of a few entries.
//
// threadgroups: (ceil(rows / threads), vectors, groups); threads: any number, along x.
// x (groups, vectors, columns), y float32 (groups, vectors, rows), bias float32 (layers, rows); the rest as in mdcsr.h.
#include "mdcsr.h"

template <typename X, bool prime>
[[kernel]] void sparse_matvec(device const X* x [[buffer(0)]],
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
                              uint3 at [[thread_position_in_grid]]) {
    if (at.x >= p.rows) return;
    uint layer = layer_of(index, at.z, p.layers);
    Matrix m = matrix_of<prime>(values, deltas, prime_table, prime_indices, row_pointers, p, layer);
    ulong which = ulong(at.z) * p.vectors + at.y;
    device const X* from = x + which * p.columns;
    Row row = row_of(m, at.x);
    float sum = 0.0f;
    uint column = 0;
    for (uint i = row.begin; i < row.end; ++i) {
        column += m.deltas[i];
        if (column >= p.columns) break;
        float level = level_of<prime>(m.values[i], prime ? m.prime_indices[i] : 0, prime_table);
        sum = fma(level, float32_of(from[column]), sum);
    }
    uint of_layer = layer * p.rows + at.x;
    float scaled = sum * scales[of_layer];
    y[which * p.rows + at.x] = p.has_bias != 0 ? scaled + bias[of_layer] : scaled;
}

template [[host_name("sparse_matvec_unit_float32")]] [[kernel]] decltype(sparse_matvec<float, false>) sparse_matvec<float, false>;
template [[host_name("sparse_matvec_unit_float16")]] [[kernel]] decltype(sparse_matvec<half, false>) sparse_matvec<half, false>;
template [[host_name("sparse_matvec_unit_bfloat16")]] [[kernel]] decltype(sparse_matvec<ushort, false>) sparse_matvec<ushort, false>;
template [[host_name("sparse_matvec_prime_float32")]] [[kernel]] decltype(sparse_matvec<float, true>) sparse_matvec<float, true>;
template [[host_name("sparse_matvec_prime_float16")]] [[kernel]] decltype(sparse_matvec<half, true>) sparse_matvec<half, true>;
template [[host_name("sparse_matvec_prime_bfloat16")]] [[kernel]] decltype(sparse_matvec<ushort, true>) sparse_matvec<ushort, true>;
