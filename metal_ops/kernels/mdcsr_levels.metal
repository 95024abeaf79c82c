// Layers of a stack to dense levels (groups, rows, columns), not yet scaled, for a dense product: exact in float32, and
// on the unit manifold, whose levels have 8 bits, in bfloat16 and float16, too.
//
// threadgroups: (ceil(rows / simdgroups), 1, groups); threads: a multiple of 32, along x. Threadgroup memory 0 holds
// `tile` floats for each simdgroup; tile is even.
#include "scatter.h"

static inline void write_level(float level, device float* to) { *to = level; }
static inline void write_level(float level, device half* to) { *to = half(level); }
static inline void write_level(float level, device ushort* to) { *to = ushort(as_type<uint>(level) >> 16); }

template <typename Y, bool prime>
[[kernel]] void mdcsr_levels(device const int8_t* values [[buffer(1)]],
                             device const uchar* deltas [[buffer(2)]],
                             device const ushort* prime_table [[buffer(3)]],
                             device const ushort* prime_indices [[buffer(4)]],
                             device const uint* row_pointers [[buffer(6)]],
                             device const int* index [[buffer(7)]],
                             device Y* dense [[buffer(9)]],
                             constant Parameters& p [[buffer(10)]],
                             threadgroup float* memory [[threadgroup(0)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             uint simd_index [[simdgroup_index_in_threadgroup]],
                             uint simd_count [[simdgroups_per_threadgroup]],
                             uint lane [[thread_index_in_simdgroup]]) {
    uint row_index = group.x * simd_count + simd_index;
    if (row_index >= p.rows) return;
    uint layer = layer_of(index, group.z, p.layers);
    Matrix m = matrix_of<prime>(values, deltas, prime_table, prime_indices, row_pointers, p, layer);
    device Y* out = dense + (ulong(group.z) * p.rows + row_index) * p.columns;
    threadgroup float* tile = memory + simd_index * p.tile;
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
        for (uint i = lane; i < count; i += SIMD_WIDTH) write_level(tile[i], out + begin + i);
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
}

template [[host_name("mdcsr_levels_unit_float32")]] [[kernel]] decltype(mdcsr_levels<float, false>) mdcsr_levels<float, false>;
template [[host_name("mdcsr_levels_unit_float16")]] [[kernel]] decltype(mdcsr_levels<half, false>) mdcsr_levels<half, false>;
template [[host_name("mdcsr_levels_unit_bfloat16")]] [[kernel]] decltype(mdcsr_levels<ushort, false>) mdcsr_levels<ushort, false>;
template [[host_name("mdcsr_levels_prime_float32")]] [[kernel]] decltype(mdcsr_levels<float, true>) mdcsr_levels<float, true>;
