// Adding a chunk's levels to where their columns are.
#pragma once
#include "chunk.h"

// Whether two lanes may hold levels of one column, which valid layers never do: columns rise, so only an entry of delta 0
// can share its column, unless it is its row's first. Lanes then add in turns. The same in every lane, and every lane
// of the simdgroup must call this.
static inline bool repeats_columns(thread const Matrix& m, thread const Row& row, uint first, uint lane,
                                   thread const Entries& e) {
    uint before = simd_shuffle_up(e.columns[LANE_ENTRIES - 1], ushort(1));
    bool repeats = false;
    for (uint j = 0; j < LANE_ENTRIES; ++j) {
        bool follows = first + lane * LANE_ENTRIES + j > row.begin;
        repeats = repeats || (follows && (j > 0 || lane > 0) && e.columns[j] == before && e.levels[j] != 0.0f);
        before = e.columns[j];
    }
    return simd_any(repeats);
}
