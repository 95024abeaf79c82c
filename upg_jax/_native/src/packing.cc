#include "packing.h"

#include "dispatch.h"

namespace upg {
namespace {

constexpr size_t kChunk = 256;

size_t size_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }

}  // namespace

void pack(const Vectors& x, size_t group, size_t features, Range range, float* packed) {
  if (range.begin == range.end) return;  // of no features, x may be null
  const size_t size = size_of(x.element);
  const auto element = [&](size_t vector, size_t feature) {
    return static_cast<const char*>(x.data) + ((group * x.count + vector) * features + feature) * size;
  };
  const auto to_float = kernels().to_float;
  if (x.count <= kSingleVectors) {
    for (size_t v = 0; v < x.count; ++v) {
      float* out = packed + v * vector_stride(features) + range.begin;
      to_float(element(v, range.begin), x.element, out, range.end - range.begin);
    }
    return;
  }
  float chunk[kUnit][kChunk];
  for (size_t begin = range.begin; begin < range.end; begin += kChunk) {
    const size_t n = smaller(kChunk, range.end - begin);
    for (size_t s = 0; s < slab_count(x.count); ++s) {
      const Slab slab = slab_at(s, x.count, features);
      for (size_t unit = 0; unit < slab.width; unit += kUnit) {
        for (size_t v = 0; v < kUnit; ++v) {
          const size_t vector = slab.first + unit + v;
          if (vector < x.count) {
            to_float(element(vector, begin), x.element, chunk[v], n);
          } else {
            for (size_t i = 0; i < n; ++i) chunk[v][i] = 0;
          }
        }
        float* out = packed + slab.offset + begin * slab.width + unit;
        for (size_t i = 0; i < n; ++i) {
          for (size_t v = 0; v < kUnit; ++v) out[i * slab.width + v] = chunk[v][i];
        }
      }
    }
  }
}

void pack_by_words(const Vectors& x, size_t group, size_t features, Range range, float* packed) {
  const size_t size = size_of(x.element);
  for (size_t v = 0; v < x.count; ++v) {
    const char* const vector = static_cast<const char*>(x.data) + (group * x.count + v) * features * size;
    for (size_t begin = range.begin, end; begin < range.end; begin = end) {
      end = smaller(range.end, begin / 64 * 64 + 64);
      float* const word = packed + (begin / 64 * x.count + v) * 64;
      kernels().to_float(vector + begin * size, x.element, word + begin % 64, end - begin);
      if (end == features) {
        for (size_t i = end - begin / 64 * 64; i < 64; ++i) word[i] = 0;
      }
    }
  }
}

void unpack_sum(const float* packed, size_t parts, size_t stride, size_t count, size_t features, Range range,
                float* y) {
  if (count <= kSingleVectors) {
    for (size_t v = 0; v < count; ++v) {
      for (size_t i = range.begin; i < range.end; ++i) {
        const float* at = packed + v * vector_stride(features) + i;
        float sum = 0;
        for (size_t part = 0; part < parts; ++part) sum += at[part * stride];
        y[v * features + i] = sum;
      }
    }
    return;
  }
  float chunk[kUnit][kChunk];
  for (size_t begin = range.begin; begin < range.end; begin += kChunk) {
    const size_t n = smaller(kChunk, range.end - begin);
    for (size_t s = 0; s < slab_count(count); ++s) {
      const Slab slab = slab_at(s, count, features);
      for (size_t unit = 0; unit < slab.width; unit += kUnit) {
        const float* at = packed + slab.offset + begin * slab.width + unit;
        for (size_t i = 0; i < n; ++i) {
          float sums[kUnit] = {};
          for (size_t part = 0; part < parts; ++part) {
            for (size_t v = 0; v < kUnit; ++v) sums[v] += at[part * stride + i * slab.width + v];
          }
          for (size_t v = 0; v < kUnit; ++v) chunk[v][i] = sums[v];
        }
        for (size_t v = 0; v < kUnit && slab.first + unit + v < count; ++v) {
          float* out = y + (slab.first + unit + v) * features + begin;
          for (size_t i = 0; i < n; ++i) out[i] = chunk[v][i];
        }
      }
    }
  }
}

void unpack_sum_of_words(const float* packed, size_t parts, size_t stride, size_t count, size_t features, Range range,
                         float* y) {
  for (size_t v = 0; v < count; ++v) {
    for (size_t begin = range.begin, end; begin < range.end; begin = end) {
      end = smaller(range.end, begin / 64 * 64 + 64);
      const float* const word = packed + (begin / 64 * count + v) * 64 + begin % 64;
      float* const out = y + v * features + begin;
      for (size_t i = 0; i < end - begin; ++i) out[i] = word[i];
      for (size_t part = 1; part < parts; ++part) {
        for (size_t i = 0; i < end - begin; ++i) out[i] += word[part * stride + i];
      }
    }
  }
}

}  // namespace upg
