// A chunk of a row: SIMD_WIDTH * LANE_ENTRIES entries, read by a simdgroup at once.
#pragma once
#include "mdcsr.h"

// A lane's entries of a chunk, four to a word of deltas and values, two to a word of prime indices.
struct Words {
    uint deltas[LANE_WORDS];
    uint values[LANE_WORDS];
    uint primes[2 * LANE_WORDS];
};

// The same, decoded. Columns are inside the matrix; what adds nothing has level 0.
struct Entries {
    uint columns[LANE_ENTRIES];
    float levels[LANE_ENTRIES];
};

static inline void read_words(device const uchar* from, thread uint* to) {
#if LANE_WORDS == 4
    uint4 words = *(device const uint4*)from;
    to[0] = words.x;
    to[1] = words.y;
    to[2] = words.z;
    to[3] = words.w;
#elif LANE_WORDS == 2
    uint2 words = *(device const uint2*)from;
    to[0] = words.x;
    to[1] = words.y;
#else
    to[0] = *(device const uint*)from;
#endif
}

// Entries [at, at + LANE_ENTRIES), as far as there are any and the row has not ended; others may come along.
template <bool prime>
static inline void read_lane(thread const Matrix& m, thread const Row& row, uint at, thread Words& words) {
    for (uint w = 0; w < LANE_WORDS; ++w) {
        words.deltas[w] = 0;
        words.values[w] = 0;
        words.primes[2 * w] = 0;
        words.primes[2 * w + 1] = 0;
    }
    if (at >= row.end) return;
    if (at + LANE_ENTRIES <= m.limit) {
        read_words(m.deltas + at, words.deltas);
        read_words((device const uchar*)(m.values + at), words.values);
        if (prime) {
            device const uchar* primes = (device const uchar*)(m.prime_indices + at);
            read_words(primes, words.primes);
            read_words(primes + LANE_ENTRIES, words.primes + LANE_WORDS);
        }
    } else {
        // Indices that are constants keep the words in registers.
        for (uint j = 0; j < LANE_ENTRIES; ++j) {
            if (at + j >= m.limit) continue;
            words.deltas[j / 4] |= uint(m.deltas[at + j]) << (8 * (j % 4));
            words.values[j / 4] |= (uint(m.values[at + j]) & 255) << (8 * (j % 4));
            if (prime) words.primes[j / 2] |= uint(m.prime_indices[at + j]) << (16 * (j % 2));
        }
    }
}

// The bytes of a word of entries [at, at + 4) that a row owns.
static inline uint owned_bytes(uint at, thread const Row& row) {
    uint skipped = row.begin > at ? row.begin - at : 0;
    uint present = row.end > at ? row.end - at : 0;
    uint from = skipped < 4 ? 0xffffffff << (8 * skipped) : 0;
    uint upto = present < 4 ? (1u << (8 * present)) - 1 : 0xffffffff;
    return from & upto;
}

// Makes what the row does not own value 0, delta 0.
static inline void keep_owned(thread const Row& row, uint at, thread Words& words) {
    for (uint w = 0; w < LANE_WORDS; ++w) {
        uint owned = owned_bytes(at + 4 * w, row);
        words.deltas[w] &= owned;
        words.values[w] &= owned;
    }
}

// start + the first `count` of a word's bytes.
static inline uint add_bytes(uint start, uint word, uint count) {
#ifdef MSL_DOT_BYTES
    return dot_bytes(word, 0x01010101 >> (8 * (4 - count)), start);
#else
    for (uint i = 0; i < count; ++i) start += (word >> (8 * i)) & 255;
    return start;
#endif
}

static inline int value_of(thread const Words& words, uint j) {
    return int(int8_t((words.values[j / 4] >> (8 * (j % 4))) & 255));
}

// Where the chunks of a row begin: all of them at multiples of a lane's entries.
static inline uint first_chunk(thread const Row& row) { return row.begin - row.begin % LANE_ENTRIES; }

// Decodes the lane's part of the chunk at entry `first`, which follows an entry in `column`. Returns the column of the
// chunk's last entry, the same in every lane. Columns never fall along a row, so if that is outside the matrix the row
// ends here. Every lane of the simdgroup must call this.
template <bool prime>
static inline uint decode_chunk(thread const Matrix& m, thread const Row& row, uint first, uint column, uint lane,
                                thread Words& words, thread Entries& entries) {
    if (first < row.begin || first + CHUNK > row.end) keep_owned(row, first + lane * LANE_ENTRIES, words);
    uint sum = 0;
    for (uint w = 0; w < LANE_WORDS; ++w) sum = add_bytes(sum, words.deltas[w], 4);
    uint upto = column + simd_prefix_inclusive_sum(sum);
    uint last = simd_broadcast(upto, ushort(SIMD_WIDTH - 1));
    uint at = upto - sum;
    for (uint w = 0; w < LANE_WORDS; ++w) {
        for (uint i = 0; i < 4; ++i) {
            uint j = 4 * w + i;
            uint k = (words.primes[j / 2] >> (16 * (j % 2))) & 0xffff;
            entries.columns[j] = add_bytes(at, words.deltas[w], i + 1);
            entries.levels[j] = level_of<prime>(value_of(words, j), k, m.prime_table);
        }
        at = entries.columns[4 * w + 3];
    }
    if (last >= m.columns) {
        for (uint j = 0; j < LANE_ENTRIES; ++j) {
            if (entries.columns[j] < m.columns) continue;
            entries.columns[j] = m.columns - 1;
            entries.levels[j] = 0.0f;
        }
    }
    return last;
}

// Reads and decodes the chunk at entry `first`.
template <bool prime>
static inline uint read_chunk(thread const Matrix& m, thread const Row& row, uint first, uint column, uint lane,
                              thread Entries& entries) {
    Words words;
    read_lane<prime>(m, row, first + lane * LANE_ENTRIES, words);
    return decode_chunk<prime>(m, row, first, column, lane, words, entries);
}
