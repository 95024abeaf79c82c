// Four entries at a time: bytes of a word, with the instructions that NVIDIA's GPUs have for them.
#pragma once
#include "mdcsr.h"

// Where a row begins and ends, unchecked; nothing for a row past the last.
static inline uint2 pointers_of(thread const Matrix& m, uint row, uint rows) {
    uint2 pointers;
    pointers.x = m.row_pointers[min(row, rows - 1)];
    pointers.y = m.row_pointers[min(row + 1, rows - 1 + uint(row < rows))];
    return pointers;
}

// The row between two pointers: inside the planes, and empty in a matrix without columns.
static inline Row row_between(thread const Matrix& m, uint2 pointers) {
    uint begin = min(pointers.x, m.capacity);
    uint end = m.columns == 0 ? begin : max(begin, min(pointers.y, m.capacity));
    Row r;
    r.begin = begin + m.shift;
    r.end = end + m.shift;
    return r;
}

// The first `count` bytes of a word, or as many as there are; the rest are 0.
static inline uint read_bytes(device const uchar* from, uint count) {
    uint word = 0;
    for (uint j = 0; j < 4; ++j) {
        if (j < count) word |= uint(from[j]) << (8 * j);
    }
    return word;
}

// Where `p` lies, for its alignment.
static inline uint as_offset(device const void* p) { return uint((ulong)p); }

#ifdef __CUDACC__
static inline uint dot_of_bytes(uint a, uint b, uint sum) {
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(sum));
    return sum;
}

// The bytes of a word from `count` on.
static inline uint bytes_from(uint count) {
    uint mask;
    asm("shl.b32 %0, %1, %2;" : "=r"(mask) : "r"(0xffffffff), "r"(8 * min(count, 4u)));
    return mask;
}
#else
static inline uint dot_of_bytes(uint a, uint b, uint sum) {
    for (uint j = 0; j < 32; j += 8) sum += ((a >> j) & 255) * ((b >> j) & 255);
    return sum;
}

static inline uint bytes_from(uint count) { return count < 4 ? 0xffffffff << (8 * count) : 0; }
#endif

static inline uint sum_of_bytes(uint word) { return dot_of_bytes(word, 0x01010101, 0); }

// start + size * (bytes 0 to j).
template <uint size>
static inline uint sum_of_first_bytes(uint word, uint j, uint start) {
    return dot_of_bytes(word, (0x01010101u * size) >> (8 * (3 - j)), start);
}

// Byte j as a signed number.
static inline float float_of_byte(uint word, uint j) {
#if defined(__CUDACC__) && !defined(CONVERT_BYTES)
    // The byte, 128 more, becomes the last bits of 2**23.
    return as_type<float>(__byte_perm(word ^ 0x80808080, 0x4b000000, 0x7440 | j)) - 8388736.0f;
#else
    return float(int8_t((word >> (8 * j)) & 255));
#endif
}

template <uint count>
static inline void read_words(threadgroup const uchar* from, thread uint* to) {
    if (count % 4 == 0) {
        for (uint w = 0; w < count; w += 4) {
            uint4 words = *(threadgroup const uint4*)(from + 4 * w);
            to[w] = words.x;
            to[w + 1] = words.y;
            to[w + 2] = words.z;
            to[w + 3] = words.w;
        }
    } else if (count % 2 == 0) {
        uint2 words = *(threadgroup const uint2*)from;
        to[0] = words.x;
        to[1] = words.y;
    } else {
        to[0] = *(threadgroup const uint*)from;
    }
}

template <typename X> static inline float element(thread const uint* words, uint i);
template <> inline float element<float>(thread const uint* words, uint i) { return as_type<float>(words[i]); }
template <> inline float element<half>(thread const uint* words, uint i) {
    return float(as_type<half>(ushort(words[i / 2] >> (16 * (i % 2)))));
}
template <> inline float element<ushort>(thread const uint* words, uint i) {
    return as_type<float>(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
}

template <uint count>
static inline void write_words(thread const uint* from, threadgroup uchar* to) {
    if (count % 4 == 0) {
        for (uint w = 0; w < count; w += 4) {
            uint4 words;
            words.x = from[w];
            words.y = from[w + 1];
            words.z = from[w + 2];
            words.w = from[w + 3];
            *(threadgroup uint4*)(to + 4 * w) = words;
        }
    } else {
        for (uint w = 0; w < count; ++w) ((threadgroup uint*)to)[w] = from[w];
    }
}

static inline uint bits_of(float x) { return as_type<uint>(x); }
static inline uint bits_of(half x) { return as_type<ushort>(x); }
static inline uint bits_of(ushort x) { return x; }

// To the nearest, ties to even.
static inline void write_rounded(float y, device float* to) { *to = y; }
static inline void write_rounded(float y, device half* to) { *to = half(y); }
static inline void write_rounded(float y, device ushort* to) {
    uint bits = as_type<uint>(y);
    bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    *to = ushort((is_nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
