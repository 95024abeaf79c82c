// y = g @ W, the transposed product, without atomics: the result is the same in every run.
//
// Rows are cut into `parts`; a simdgroup adds up those of one part in a float32 copy of the result in device memory. The
// parts are then added by dense_sparse_sum, unless there is only one.
//
// dense_sparse: g (groups, vectors, rows), sums float32 (groups, vectors, parts, columns).
//   threadgroups: (ceil(parts / simdgroups), vectors, groups); threads: a multiple of 32, along x.
// dense_sparse_sum: sums as above, y float32 (groups, vectors, columns).
//   threadgroups: (ceil(columns / threads), vectors, groups); threads: any number, along x.
#include "scatter.h"

template <typename X, bool prime>
[[kernel]] void dense_sparse(device const X* g [[buffer(0)]],
                             device const int8_t* values [[buffer(1)]],
                             device const uchar* deltas [[buffer(2)]],
                             device const ushort* prime_table [[buffer(3)]],
                             device const ushort* prime_indices [[buffer(4)]],
                             device const float* scales [[buffer(5)]],
                             device const uint* row_pointers [[buffer(6)]],
                             device const int* index [[buffer(7)]],
                             device float* sums [[buffer(9)]],
                             constant Parameters& p [[buffer(10)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             uint simd_index [[simdgroup_index_in_threadgroup]],
                             uint simd_count [[simdgroups_per_threadgroup]],
                             uint lane [[thread_index_in_simdgroup]]) {
    uint part = group.x * simd_count + simd_index;
    if (part >= p.parts) return;
    uint layer = layer_of(index, group.z, p.layers);
    Matrix m = matrix_of<prime>(values, deltas, prime_table, prime_indices, row_pointers, p, layer);
    ulong which = ulong(group.z) * p.vectors + group.y;
    device float* out = sums + (which * p.parts + part) * p.columns;
    for (uint i = lane; i < p.columns; i += SIMD_WIDTH) out[i] = 0.0f;
    simdgroup_barrier(mem_flags::mem_device);

    uint rows_per_part = (p.rows + p.parts - 1) / p.parts;
    uint begin = min(part * rows_per_part, p.rows);
    uint end = min(begin + rows_per_part, p.rows);
    for (uint row_index = begin; row_index < end; ++row_index) {
        Row row = row_of(m, row_index);
        float scaled = float32_of(g[which * p.rows + row_index]) * scales[layer * p.rows + row_index];
        uint column = 0;
        for (uint first = first_chunk(row); first < row.end && column < p.columns; first += CHUNK) {
            Entries e;
            column = read_chunk<prime>(m, row, first, column, lane, e);
            if (repeats_columns(m, row, first, lane, e)) {
                for (uint turn = 0; turn < SIMD_WIDTH; ++turn) {
                    if (lane == turn) {
                        for (uint j = 0; j < LANE_ENTRIES; ++j) {
                            if (e.levels[j] != 0.0f) out[e.columns[j]] += e.levels[j] * scaled;
                        }
                    }
                    simdgroup_barrier(mem_flags::mem_device);
                }
            } else {
                // All reads first: the columns are distinct, which a compiler cannot know.
                float before[LANE_ENTRIES];
                for (uint j = 0; j < LANE_ENTRIES; ++j) before[j] = out[e.columns[j]];
                for (uint j = 0; j < LANE_ENTRIES; ++j) {
                    if (e.levels[j] != 0.0f) out[e.columns[j]] = fma(e.levels[j], scaled, before[j]);
                }
                simdgroup_barrier(mem_flags::mem_device);
            }
        }
    }
}

[[kernel]] void dense_sparse_sum(device const float* sums [[buffer(0)]],
                                 device float* y [[buffer(9)]],
                                 constant Parameters& p [[buffer(10)]],
                                 uint3 at [[thread_position_in_grid]]) {
    if (at.x >= p.columns) return;
    ulong which = ulong(at.z) * p.vectors + at.y;
    device const float* from = sums + which * p.parts * p.columns + at.x;
    float sum = 0.0f;
    for (uint part = 0; part < p.parts; ++part) sum += from[ulong(part) * p.columns];
    y[which * p.columns + at.x] = sum;
}

template [[host_name("dense_sparse_unit_float32")]] [[kernel]] decltype(dense_sparse<float, false>) dense_sparse<float, false>;
template [[host_name("dense_sparse_unit_float16")]] [[kernel]] decltype(dense_sparse<half, false>) dense_sparse<half, false>;
template [[host_name("dense_sparse_unit_bfloat16")]] [[kernel]] decltype(dense_sparse<ushort, false>) dense_sparse<ushort, false>;
template [[host_name("dense_sparse_prime_float32")]] [[kernel]] decltype(dense_sparse<float, true>) dense_sparse<float, true>;
template [[host_name("dense_sparse_prime_float16")]] [[kernel]] decltype(dense_sparse<half, true>) dense_sparse<half, true>;
template [[host_name("dense_sparse_prime_bfloat16")]] [[kernel]] decltype(dense_sparse<ushort, true>) dense_sparse<ushort, true>;
