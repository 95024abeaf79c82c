// y = x @ W.T for GPUs whose threadgroups can hold all of x: they stay for the whole launch, stage VECTORS vectors once,
// and their simdgroups take rows in turn. The planes stream through registers, a batch of a row ahead of its use.
//
// With TILED a threadgroup takes one of p.parts tiles of p.tile columns, and y has a part of the sums for each.
//
// threadgroups: (as many as run at once, ceil(vectors / VECTORS) [* parts], groups); threads: a multiple of 32, along x.
// Threadgroup memory 0 holds columns * VECTORS elements, (tile + 1) * VECTORS with TILED: floats for one vector, x's own
// dtype for more. Threadgroup memory 1 holds 10,000 floats on the prime manifold. Apple's GPUs have too little of it.
// x (groups, vectors, columns), y ([parts,] groups, vectors, rows) in float32, or with ROUNDED in x's dtype, bias float32
// (layers, rows); the rest as in mdcsr.h.
#include "mdcsr.h"
#include "words.h"

// Vectors at a time: 1, 2, 4, 8 or 16.
#ifndef VECTORS
#define VECTORS 1
#endif

// 1 for tiles of columns, with more vectors than one.
#ifndef TILED
#define TILED 0
#endif

// 1 for a result in x's dtype.
#ifndef ROUNDED
#define ROUNDED 0
#endif
#if ROUNDED
#define RESULT X
#else
#define RESULT float
#endif

// Words of four entries that a lane takes at a time, an even number.
#ifndef BATCH_WORDS
#define BATCH_WORDS 4
#endif
#define SPAN (SIMD_WIDTH * 4)
#define BATCH (BATCH_WORDS * SPAN)

#if VECTORS == 1
#define STAGED(X) float
#else
#define STAGED(X) X
#endif

#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800 && BATCH_WORDS >= 4
// Long rows are read ahead by the L2 cache; for short ones that takes longer. Older GPUs lack the hint.
static inline uint word_at(device const uchar* from) {
    uint word;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.b32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
}
#else
static inline uint word_at(device const uchar* from) { return *(device const uint*)from; }
#endif

// A lane's part of a batch: word w is entries [first + w * SPAN + 4 * lane, ... + 4).
struct Batch {
    uint deltas[BATCH_WORDS];
    uint values[BATCH_WORDS];
    uint primes[2 * BATCH_WORDS];
};

// Words without an entry of the row become 0; what other rows own in the rest is masked later.
template <bool prime>
static inline void read_batch(thread const Matrix& m, thread const Row& row, uint first, uint lane,
                              thread Batch& batch) {
    uint at = first + 4 * lane;
    device const uchar* deltas = m.deltas + at;
    device const uchar* values = (device const uchar*)(m.values + at);
    device const uchar* primes = (device const uchar*)(m.prime_indices + at);
    if (first + BATCH <= m.limit) {
        for (uint w = 0; w < BATCH_WORDS; ++w) {
            bool present = at + w * SPAN < row.end;
            batch.deltas[w] = present ? word_at(deltas + w * SPAN) : 0;
            batch.values[w] = present ? word_at(values + w * SPAN) : 0;
            if (prime) {
                batch.primes[2 * w] = present ? word_at(primes + 2 * w * SPAN) : 0;
                batch.primes[2 * w + 1] = present ? word_at(primes + 2 * w * SPAN + 4) : 0;
            }
        }
    } else {
        for (uint w = 0; w < BATCH_WORDS; ++w) {
            uint left = m.limit > at + w * SPAN ? m.limit - (at + w * SPAN) : 0;
            batch.deltas[w] = read_bytes(deltas + w * SPAN, left);
            batch.values[w] = read_bytes(values + w * SPAN, left);
            if (prime) {
                batch.primes[2 * w] = read_bytes(primes + 2 * w * SPAN, 2 * left);
                batch.primes[2 * w + 1] = read_bytes(primes + 2 * w * SPAN + 4, left > 2 ? 2 * left - 4 : 0);
            }
            if (at + w * SPAN >= row.end) {
                batch.deltas[w] = 0;
                batch.values[w] = 0;
            }
        }
    }
}

// Columns of 32 bytes are read in two halves, by odd lanes the other way round: all banks are asked at once.
template <typename X>
static inline uint first_half(uint lane) {
    return VECTORS * sizeof(X) == 32 && VECTORS > 1 ? 16 * (lane % 2) : 0;
}

// level * x for the vectors staged at a column.
template <typename X>
static inline void add_products(threadgroup const uchar* at, uint half_first, float level, thread float* sums) {
#if VECTORS == 1
    sums[0] = fma(level, *(threadgroup const float*)at, sums[0]);
#else
    uint words[VECTORS * sizeof(X) / 4];
    if (VECTORS * sizeof(X) == 32) {
        read_words<4>(at + half_first, words);
        read_words<4>(at + 16 - half_first, words + 4);
    } else {
        read_words<VECTORS * sizeof(X) / 4>(at, words);
    }
    for (uint v = 0; v < VECTORS; ++v) sums[v] = fma(level, element<X>(words, v), sums[v]);
#endif
}

template <typename X, bool prime>
static inline void add_entry(thread const Batch& batch, uint w, uint j, uint at, uint half_first,
                             threadgroup const uchar* staged, threadgroup const float* primes, thread float* sums) {
    float level = float_of_byte(batch.values[w], j);
    if (prime) {
        uint k = (batch.primes[2 * w + j / 2] >> (16 * (j % 2))) & 0xffff;
        level *= primes[min(k, 9999u)];  // exact: |q * P[k]| < 2**24
    }
    add_products<X>(staged + at, half_first, level, sums);
}

// `count` columns, and one of zeros behind a tile. Vectors beyond the last repeat it.
template <typename X>
static inline void stage(device const X* from, uint columns, uint count, uint present, uint thread_index, uint threads,
                         threadgroup uchar* staged) {
#if VECTORS == 1
    constexpr uint each = 16 / sizeof(X);
    uint wide = as_offset(from) % 16 == 0 ? count / each : 0;
#pragma unroll 4
    for (uint i = thread_index; i < wide; i += threads) {
        uint4 read = ((device const uint4*)from)[i];
        uint words[4] = {read.x, read.y, read.z, read.w};
        for (uint e = 0; e < each; e += 4) {
            float4 four;
            four.x = element<X>(words, e);
            four.y = element<X>(words, e + 1);
            four.z = element<X>(words, e + 2);
            four.w = element<X>(words, e + 3);
            *(threadgroup float4*)(staged + 4 * (i * each + e)) = four;
        }
    }
    for (uint i = wide * each + thread_index; i < count; i += threads) {
        ((threadgroup float*)staged)[i] = float32_of(from[i]);
    }
#else
    constexpr uint each = VECTORS * sizeof(X) / 4;
#pragma unroll 4
    for (uint i = thread_index; i < count + TILED; i += threads) {
        uint words[each];
        for (uint w = 0; w < each; ++w) words[w] = 0;
        for (uint v = 0; v < VECTORS && i < count; ++v) {
            uint at = v * sizeof(X);
            words[at / 4] |= bits_of(from[min(v, present - 1) * columns + i]) << (8 * (at % 4));
        }
        write_words<each>(words, staged + 4 * each * i);
    }
#endif
}

// The sum over lanes of each of the vectors' sums: of vector lane / (32 / VECTORS) in each lane.
template <typename X>
static inline float sum_of_vectors(thread float* sums, uint lane) {
    bool turned = first_half<X>(lane) != 0;
    for (uint v = 0; v < VECTORS / 2; ++v) {
        float lower = turned ? sums[v + VECTORS / 2] : sums[v];
        sums[v + VECTORS / 2] = turned ? sums[v] : sums[v + VECTORS / 2];
        sums[v] = lower;
    }
    uint half_of = SIMD_WIDTH / 2;
    for (uint left = VECTORS / 2; left > 0; left /= 2) {
        bool upper = (lane & half_of) != 0;
        for (uint i = 0; i < left; ++i) {
            float kept = upper ? sums[i + left] : sums[i];
            float sent = upper ? sums[i] : sums[i + left];
            sums[i] = kept + simd_shuffle_xor(sent, ushort(half_of));
        }
        half_of /= 2;
    }
    float sum = sums[0];
    for (; half_of > 0; half_of /= 2) sum += simd_shuffle_xor(sum, ushort(half_of));
    return sum;
}

template <typename X, bool prime>
[[kernel]] void sparse_matvec_stream(device const X* x [[buffer(0)]],
                                     device const int8_t* values [[buffer(1)]],
                                     device const uchar* deltas [[buffer(2)]],
                                     device const ushort* prime_table [[buffer(3)]],
                                     device const ushort* prime_indices [[buffer(4)]],
                                     device const float* scales [[buffer(5)]],
                                     device const uint* row_pointers [[buffer(6)]],
                                     device const int* index [[buffer(7)]],
                                     device const float* bias [[buffer(8)]],
                                     device RESULT* y [[buffer(9)]],
                                     constant Parameters& p [[buffer(10)]],
                                     threadgroup uchar* staged [[threadgroup(0)]],
                                     threadgroup float* primes [[threadgroup(1)]],
                                     uint3 group [[threadgroup_position_in_grid]],
                                     uint3 groups [[threadgroups_per_grid]],
                                     uint thread_index [[thread_index_in_threadgroup]],
                                     uint3 threads [[threads_per_threadgroup]],
                                     uint simd_index [[simdgroup_index_in_threadgroup]],
                                     uint simd_count [[simdgroups_per_threadgroup]],
                                     uint lane [[thread_index_in_simdgroup]]) {
    uint layer = layer_of(index, group.z, p.layers);
    Matrix m = matrix_of<prime>(values, deltas, prime_table, prime_indices, row_pointers, p, layer);
    uint part = TILED ? group.y % p.parts : 0;
    uint begin = part * p.tile;
    uint count = TILED ? min(p.tile, p.columns - begin) : p.columns;
    uint first_vector = (TILED ? group.y / p.parts : group.y) * VECTORS;
    ulong which = ulong(group.z) * p.vectors + first_vector;
    ulong into = ulong(part) * p.groups * p.vectors + which;
    uint present = min(uint(VECTORS), p.vectors - first_vector);
    device const float* row_scales = scales + layer * p.rows;

    // Rows past the last are empty, so that all simdgroups read alike.
    uint stride = groups.x * simd_count;
    uint row_index = simd_index * groups.x + group.x;
    Row row = row_between(m, pointers_of(m, row_index, p.rows));
    // As they are in memory: what is done with them would have to wait for them.
    uint2 upcoming = pointers_of(m, row_index + stride, p.rows);
    float scale = row_scales[min(row_index, p.rows - 1)];
    uint first = row.begin & ~3u;
    Batch batch;
    read_batch<prime>(m, row, first, lane, batch);

    stage(x + which * p.columns + begin, p.columns, count, present, thread_index, threads.x, staged);
    if (prime) {
        // Eight of the table's two bytes at a time.
        for (uint k = 8 * thread_index; k < 10000; k += 8 * threads.x) {
            uint4 eight = *(device const uint4*)(prime_table + k);
            uint words[4] = {eight.x, eight.y, eight.z, eight.w};
            for (uint i = 0; i < 8; ++i) {
                uint low = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffff;
                primes[k + i] = float(low + (k + i < 6542 ? 0u : 65536u));
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    constexpr uint size = VECTORS * sizeof(STAGED(X));  // bytes of a column
    uint half_first = first_half<X>(lane);
    uint column = 0;
    float sums[VECTORS];
    for (uint v = 0; v < VECTORS; ++v) sums[v] = 0.0f;
    while (row_index < p.rows) {
        bool ends = first + BATCH >= row.end || (TILED && column >= begin + count);
        Row next = row;
        uint next_first = first + BATCH;
        float next_scale = scale;
        if (ends) {
            next = row_between(m, upcoming);
            next_first = next.begin & ~3u;
            next_scale = row_scales[min(row_index + stride, p.rows - 1)];
            upcoming = pointers_of(m, row_index + 2 * stride, p.rows);
        }
        Batch ahead;
        read_batch<prime>(m, next, next_first, lane, ahead);

        if (first < row.begin && lane == 0) {  // by less than a word
            batch.deltas[0] &= 0xffffffff << (8 * (row.begin - first));
            batch.values[0] &= 0xffffffff << (8 * (row.begin - first));
        }
        if (ends) {
            for (uint w = 0; w < BATCH_WORDS; ++w) {
                uint others = bytes_from(row.end - (first + w * SPAN + 4 * lane));
                batch.deltas[w] &= ~others;
                batch.values[w] &= ~others;
            }
        }
#if TILED
        uint earlier = column;
#endif
        // Two sums of 32 words' deltas fit in one of 32 bits: each is below 2**15.
        uint starts[BATCH_WORDS];
        for (uint w = 0; w < BATCH_WORDS; w += 2) {
            uint own = sum_of_bytes(batch.deltas[w]) | (sum_of_bytes(batch.deltas[w + 1]) << 16);
            uint before = simd_prefix_exclusive_sum(own);
            uint all = simd_broadcast(before + own, ushort(SIMD_WIDTH - 1));
            starts[w] = column + (before & 0xffff);
            column += all & 0xffff;
            starts[w + 1] = column + (before >> 16);
            column += all >> 16;
        }
#if TILED
        if (column >= begin && earlier < begin + count) {
            for (uint w = 0; w < BATCH_WORDS; ++w) {
                if (first + w * SPAN >= row.end) break;
                uint start = (starts[w] - begin) * size;  // wraps around before the tile
                for (uint j = 0; j < 4; ++j) {
                    uint at = min(sum_of_first_bytes<size>(batch.deltas[w], j, start), count * size);
                    add_entry<X, prime>(batch, w, j, at, half_first, staged, primes, sums);
                }
            }
        }
        column = min(column, p.columns);  // an entry outside the matrix ends the row
#else
        if (column < p.columns) {
            for (uint w = 0; w < BATCH_WORDS; ++w) {
                if (first + w * SPAN >= row.end) break;
                uint start = starts[w] * size;
                for (uint j = 0; j < 4; ++j) {
                    uint at = sum_of_first_bytes<size>(batch.deltas[w], j, start);
                    add_entry<X, prime>(batch, w, j, at, half_first, staged, primes, sums);
                }
            }
        } else {
            // Columns never fall along a row: an entry outside the matrix ends it.
#pragma unroll
            for (uint w = 0; w < BATCH_WORDS; ++w) {
                uint at = starts[w];
                for (uint j = 0; j < 4; ++j) {
                    at += (batch.deltas[w] >> (8 * j)) & 255;
                    if (at < p.columns) add_entry<X, prime>(batch, w, j, at * size, half_first, staged, primes, sums);
                }
            }
            column = p.columns;
        }
#endif
        if (ends) {
            float scaled = sum_of_vectors<X>(sums, lane) * scale;
            uint v = lane / (SIMD_WIDTH / VECTORS);
            if (lane % (SIMD_WIDTH / VECTORS) == 0 && v < present) {
                if (begin == 0 && p.has_bias != 0) scaled += bias[layer * p.rows + row_index];
                write_rounded(scaled, y + (into + v) * p.rows + row_index);
            }
            for (uint u = 0; u < VECTORS; ++u) sums[u] = 0.0f;
            column = 0;
            row_index += stride;
        }
        row = next;
        first = next_first;
        scale = next_scale;
        batch = ahead;
    }
}

template [[host_name("sparse_matvec_stream_unit_float32")]] [[kernel]] decltype(sparse_matvec_stream<float, false>) sparse_matvec_stream<float, false>;
template [[host_name("sparse_matvec_stream_unit_float16")]] [[kernel]] decltype(sparse_matvec_stream<half, false>) sparse_matvec_stream<half, false>;
template [[host_name("sparse_matvec_stream_unit_bfloat16")]] [[kernel]] decltype(sparse_matvec_stream<ushort, false>) sparse_matvec_stream<ushort, false>;
template [[host_name("sparse_matvec_stream_prime_float32")]] [[kernel]] decltype(sparse_matvec_stream<float, true>) sparse_matvec_stream<float, true>;
template [[host_name("sparse_matvec_stream_prime_float16")]] [[kernel]] decltype(sparse_matvec_stream<half, true>) sparse_matvec_stream<half, true>;
template [[host_name("sparse_matvec_stream_prime_bfloat16")]] [[kernel]] decltype(sparse_matvec_stream<ushort, true>) sparse_matvec_stream<ushort, true>;
