// A row's product with one vector, by a simdgroup.
#pragma once
#include "chunk.h"

// The lane's part of the sum of levels times x[offset + column]; `x` points to device or to threadgroup memory.
template <bool prime, typename Vector>
static inline float row_sum(thread const Matrix& m, thread const Row& row, uint lane, Vector x, uint offset) {
    float sum = 0.0f;
    uint column = 0;
    uint first = first_chunk(row);
    Words words;
    read_lane<prime>(m, row, first + lane * LANE_ENTRIES, words);
    while (first < row.end && column < m.columns) {
        Words next;  // read before the chunk at hand is used, so that both wait for memory together
        read_lane<prime>(m, row, first + CHUNK + lane * LANE_ENTRIES, next);
        Entries e;
        column = decode_chunk<prime>(m, row, first, column, lane, words, e);
        for (uint j = 0; j < LANE_ENTRIES; ++j) sum = fma(e.levels[j], float32_of(x[offset + e.columns[j]]), sum);
        first += CHUNK;
        words = next;
    }
    return sum;
}
