// y = x @ W.T with x staged in threadgroup memory, a tile at a time; one simdgroup per row, several rows each.
//
// threadgroups: (ceil(rows / (simdgroups * ROWS_PER_SIMDGROUP)), vectors, groups); threads: a multiple of 32, along x.
// Threadgroup memory 0 holds `tile` floats. Best where all of x fits; every tile more reads the chunks at its edges again.
// x (groups, vectors, columns), y float32 (groups, vectors, rows), bias float32 (layers, rows); the rest as in mdcsr.h.
#include "row_sum.h"

#ifndef ROWS_PER_SIMDGROUP
#define ROWS_PER_SIMDGROUP 4
#endif

// Every row of a simdgroup, a tile of x after the other. A chunk that a tile's end cuts is read again with the next tile.
template <typename X, bool prime>
static inline void tiled_sums(thread const Matrix& m, device const X* x, uint offset, threadgroup float* staged,
                              uint tile, uint thread_index, uint threads, uint lane, thread Row* rows,
                              thread float* sums) {
    uint firsts[ROWS_PER_SIMDGROUP];
    uint columns[ROWS_PER_SIMDGROUP];
    for (uint r = 0; r < ROWS_PER_SIMDGROUP; ++r) {
        firsts[r] = first_chunk(rows[r]);
        columns[r] = 0;
        sums[r] = 0.0f;
    }
    for (uint begin = 0; begin < m.columns; begin += tile) {
        uint count = min(tile, m.columns - begin);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = thread_index; i < count; i += threads) staged[i] = float32_of(x[offset + begin + i]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint r = 0; r < ROWS_PER_SIMDGROUP; ++r) {
            while (firsts[r] < rows[r].end && columns[r] < begin + count) {
                Entries e;
                uint last = read_chunk<prime>(m, rows[r], firsts[r], columns[r], lane, e);
                for (uint j = 0; j < LANE_ENTRIES; ++j) {
                    uint at = e.columns[j] - begin;  // wraps around, and so is no less than count, before the tile
                    if (at < count) sums[r] = fma(e.levels[j], staged[at], sums[r]);
                }
                if (last >= begin + count) break;
                firsts[r] += CHUNK;
                columns[r] = last;
            }
        }
    }
}

template <typename X, bool prime>
[[kernel]] void sparse_matvec_shared(device const X* x [[buffer(0)]],
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
                                     threadgroup float* staged [[threadgroup(0)]],
                                     uint3 group [[threadgroup_position_in_grid]],
                                     uint thread_index [[thread_index_in_threadgroup]],
                                     uint3 threads [[threads_per_threadgroup]],
                                     uint simd_index [[simdgroup_index_in_threadgroup]],
                                     uint simd_count [[simdgroups_per_threadgroup]],
                                     uint lane [[thread_index_in_simdgroup]]) {
    uint layer = layer_of(index, group.z, p.layers);
    Matrix m = matrix_of<prime>(values, deltas, prime_table, prime_indices, row_pointers, p, layer);
    ulong which = ulong(group.z) * p.vectors + group.y;
    uint offset = uint(which) * p.columns;
    uint first_row = group.x * ROWS_PER_SIMDGROUP * simd_count + simd_index;
    Row rows[ROWS_PER_SIMDGROUP];
    float sums[ROWS_PER_SIMDGROUP];
    for (uint r = 0; r < ROWS_PER_SIMDGROUP; ++r) {
        uint row_index = first_row + r * simd_count;
        rows[r] = row_of(m, min(row_index, p.rows - 1));
        if (row_index >= p.rows) rows[r].end = rows[r].begin;
    }
    if (p.columns <= p.tile) {
        for (uint i = thread_index; i < p.columns; i += threads.x) staged[i] = float32_of(x[offset + i]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint r = 0; r < ROWS_PER_SIMDGROUP; ++r) sums[r] = row_sum<prime>(m, rows[r], lane, staged, 0);
    } else {
        tiled_sums<X, prime>(m, x, offset, staged, p.tile, thread_index, threads.x, lane, rows, sums);
    }
    for (uint r = 0; r < ROWS_PER_SIMDGROUP; ++r) {
        uint row_index = first_row + r * simd_count;
        float sum = simd_sum(sums[r]);
        if (lane == 0 && row_index < p.rows) {
            uint of_layer = layer * p.rows + row_index;
            float scaled = sum * scales[of_layer];
            y[which * p.rows + row_index] = p.has_bias != 0 ? scaled + bias[of_layer] : scaled;
        }
    }
}

template [[host_name("sparse_matvec_shared_unit_float32")]] [[kernel]] decltype(sparse_matvec_shared<float, false>) sparse_matvec_shared<float, false>;
template [[host_name("sparse_matvec_shared_unit_float16")]] [[kernel]] decltype(sparse_matvec_shared<half, false>) sparse_matvec_shared<half, false>;
template [[host_name("sparse_matvec_shared_unit_bfloat16")]] [[kernel]] decltype(sparse_matvec_shared<ushort, false>) sparse_matvec_shared<ushort, false>;
template [[host_name("sparse_matvec_shared_prime_float32")]] [[kernel]] decltype(sparse_matvec_shared<float, true>) sparse_matvec_shared<float, true>;
template [[host_name("sparse_matvec_shared_prime_float16")]] [[kernel]] decltype(sparse_matvec_shared<half, true>) sparse_matvec_shared<half, true>;
template [[host_name("sparse_matvec_shared_prime_bfloat16")]] [[kernel]] decltype(sparse_matvec_shared<ushort, true>) sparse_matvec_shared<ushort, true>;
