// Every layer of a stack to dense float32 (layers, rows, columns); each weight is rounded once.
//
// threadgroups: (ceil(rows / simdgroups), 1, layers); threads: a multiple of 32, along x. Threadgroup memory 0 holds
// `tile` floats for each simdgroup.
#include "scatter.h"

template <bool prime>
[[kernel]] void mdcsr_decode(device const int8_t* values [[buffer(1)]],
                             device const uchar* deltas [[buffer(2)]],
                             device const ushort* prime_table [[buffer(3)]],
                             device const ushort* prime_indices [[buffer(4)]],
                             device const float* scales [[buffer(5)]],
                             device const uint* row_pointers [[buffer(6)]],
                             device float* dense [[buffer(9)]],
                             constant Parameters& p [[buffer(10)]],
                             threadgroup float* memory [[threadgroup(0)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             uint simd_index [[simdgroup_index_in_threadgroup]],
                             uint simd_count [[simdgroups_per_threadgroup]],
                             uint lane [[thread_index_in_simdgroup]]) {
    uint row_index = group.x * simd_count + simd_index;
    if (row_index >= p.rows) return;
    Matrix m = matrix_of<prime>(values, deltas, prime_table, prime_indices, row_pointers, p, group.z);
    ulong of_stack = ulong(group.z) * p.rows + row_index;
    device float* out = dense + of_stack * p.columns;
    threadgroup float* tile = memory + simd_index * p.tile;
    float scale = scales[of_stack];
    Row row = row_of(m, row_index);
    uint first = first_chunk(row);
    uint column = 0;
    for (uint begin = 0; begin < p.columns; begin += p.tile) {
        uint count = min(p.tile, p.columns - begin);
        for (uint i = lane; i < count; i += SIMD_WIDTH) tile[i] = 0.0f;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        while (first < row.end && column < begin + count) {
            Entries e;
            uint last = read_chunk<prime>(m, row, first, column, lane, e);
            bool in_turns = repeats_columns(m, row, first, lane, e);
            for (uint turn = 0; turn < (in_turns ? SIMD_WIDTH : 1); ++turn) {
                if (!in_turns || lane == turn) {
                    for (uint j = 0; j < LANE_ENTRIES; ++j) {
                        uint at = e.columns[j] - begin;  // wraps around before the tile
                        if (at < count && e.levels[j] != 0.0f) tile[at] += e.levels[j];
                    }
                }
                simdgroup_barrier(mem_flags::mem_threadgroup);
            }
            if (last >= begin + count) break;  // read again with the next tile
            first += CHUNK;
            column = last;
        }
        for (uint i = lane; i < count; i += SIMD_WIDTH) out[begin + i] = tile[i] * scale;
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
}

template [[host_name("mdcsr_decode_unit")]] [[kernel]] decltype(mdcsr_decode<false>) mdcsr_decode<false>;
template [[host_name("mdcsr_decode_prime")]] [[kernel]] decltype(mdcsr_decode<true>) mdcsr_decode<true>;
