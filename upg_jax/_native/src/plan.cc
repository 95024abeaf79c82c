#include "plan.h"

#include <algorithm>

#include "costs.h"
#include "dispatch.h"
#include "packing.h"
#include "row_split.h"

namespace upg {
namespace {

// Entries that make an item worth handing to a thread: some microseconds' work.
constexpr size_t kItemEntries = 16384;
constexpr size_t kItemFloats = 32768;
// A small layer has smaller items: of three, one of two threads would do two.
constexpr size_t kFewItems = 8;
constexpr size_t kLeastEntries = 4096;

size_t product_items(const Layer& layer) {
  const size_t work = RowSplit::work(layer);
  return std::max(work / kItemEntries, std::min(kFewItems - 1, work / kLeastEntries)) + 1;
}

Workspace& workspace() {
  thread_local const std::unique_ptr<Workspace> w(new Workspace);
  return *w;
}

float* aligned(float* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  return p + (kAlignment - address % kAlignment) % kAlignment / sizeof(float);
}

// Consecutive pieces of [0, total), `pieces()` of them.
class Chunks {
 public:
  Chunks(size_t total, size_t size) : total_(total), size_(std::max<size_t>(round_up(size, kUnit), kUnit)) {}
  size_t pieces() const { return std::max<size_t>((total_ + size_ - 1) / size_, 1); }
  Range piece(size_t i) const { return {std::min(total_, i * size_), std::min(total_, (i + 1) * size_)}; }

 private:
  size_t total_;
  size_t size_;
};

class ProductPlan : public Plan {
 public:
  ProductPlan(const Stack& stack, const Vectors& x, float* y, float* scratch)
      : stack_(stack),
        x_(x),
        y_(y),
        packed_(aligned(scratch)),
        whole_(reads_whole_rows(stack.first, x.count)),
        packed_floats_(whole_ ? floats_by_words(x.count, stack.first.columns) : packed_floats(x.count, stack.first.columns)),
        chunks_(stack.first.columns, kItemFloats / x.count),
        matrix_(!whole_ && is_matrix(stack.first, x.count)),
        tiles_(stack.first.rows, kMatrixRows),
        split_(stack.first, product_items(stack.first)),
        turns_((slab_count(x.count) + kSlabsAtOnce - 1) / kSlabsAtOnce) {
    items_ = {stack.groups * chunks_.pieces(), stack.groups * pieces() * turns_};
    cost_ = static_cast<double>(stack.groups) *
            (product_cost(stack.first, x.count) + 0.5 * static_cast<double>(packed_floats_));
  }

  void run(size_t phase, size_t item) const override {
    if (phase == 0) {
      const size_t group = item / chunks_.pieces();
      (whole_ ? pack_by_words : pack)(x_, group, stack_.first.columns, chunks_.piece(item % chunks_.pieces()), packed(group));
      return;
    }
    const size_t turn = item % turns_;
    const size_t piece = item / turns_ % pieces();
    const size_t group = item / turns_ / pieces();
    const Layer layer = stack_.of_group(group);
    const Range rows = matrix_ || whole_ ? tiles_.piece(piece) : split_.rows(layer, piece);
    float* const y = y_ + group * x_.count * layer.rows;
    if (whole_) {
      const auto multiply = layer.value_bits == 8 ? kernels().product_of_whole_rows : kernels().product_of_narrow;
      return multiply(layer, packed(group), x_.count, y, rows);
    }
    if (x_.count <= kSingleVectors) {
      for (size_t v = 0; v < x_.count; ++v) {
        kernels().product_with_vector(layer, packed(group) + v * vector_stride(layer.columns), y + v * layer.rows, rows);
      }
      return;
    }
    const Range slabs = {turn * kSlabsAtOnce, std::min(slab_count(x_.count), (turn + 1) * kSlabsAtOnce)};
    const auto multiply = matrix_ ? kernels().matrix_product : kernels().product;
    multiply(layer, packed(group), x_.count, y, slabs, rows, workspace());
  }

 private:
  float* packed(size_t group) const { return packed_ + group * packed_floats_; }
  size_t pieces() const { return matrix_ || whole_ ? tiles_.pieces() : split_.pieces(); }

  Stack stack_;
  Vectors x_;
  float* y_;
  float* packed_;
  bool whole_;
  size_t packed_floats_;
  Chunks chunks_;
  bool matrix_;
  Chunks tiles_;
  RowSplit split_;
  size_t turns_;
};

// Pieces of the vectors that are summed on their own.
size_t transposed_slabs(const Layer& layer, size_t vectors) {
  if (adds_whole_rows(layer, vectors)) return 1;
  return vectors <= kSingleVectors ? vectors : slab_count(vectors);
}

// Rows scatter over all columns, so each part of the rows sums into its own copy of the result; the copies are added in
// the end. How many parts there are depends on shapes only, hence so do the sums.
size_t transposed_parts(const Layer& layer, size_t vectors) {
  constexpr size_t kParts = 8;
  constexpr size_t kEntriesPerColumn = 32;  // below, adding up copies costs more than it gains
  const size_t independent = transposed_slabs(layer, vectors);
  const size_t worthwhile = RowSplit::work(layer) / (kEntriesPerColumn * layer.columns + 1);
  return std::max<size_t>(std::min(kParts / std::max<size_t>(independent, 1), worthwhile), 1);
}

class TransposedPlan : public Plan {
 public:
  TransposedPlan(const Stack& stack, const Vectors& g, float* y, float* scratch)
      : stack_(stack),
        g_(g),
        y_(y),
        packed_(aligned(scratch)),
        packed_floats_(packed_floats(g.count, stack.first.rows)),
        sums_(packed_ + stack.groups * packed_floats_),
        whole_(adds_whole_rows(stack.first, g.count)),
        sums_floats_(whole_ ? floats_by_words(g.count, stack.first.columns) : packed_floats(g.count, stack.first.columns)),
        parts_(transposed_parts(stack.first, g.count)),
        slabs_(transposed_slabs(stack.first, g.count)),
        split_(stack.first, parts_),
        rows_(stack.first.rows, kItemFloats / g.count),
        columns_(stack.first.columns, kItemFloats / g.count) {
    items_ = {stack.groups * rows_.pieces(), stack.groups * parts_ * slabs_, stack.groups * columns_.pieces()};
    cost_ = static_cast<double>(stack.groups) *
            (transposed_cost(stack.first, g.count) +
             0.5 * static_cast<double>(packed_floats_ + parts_ * sums_floats_));
  }

  void run(size_t phase, size_t item) const override {
    if (phase == 0) {
      const size_t group = item / rows_.pieces();
      pack(g_, group, stack_.first.rows, rows_.piece(item % rows_.pieces()), packed(group));
    } else if (phase == 1) {
      accumulate(item / slabs_ / parts_, item / slabs_ % parts_, item % slabs_);
    } else {
      const size_t group = item / columns_.pieces();
      (whole_ ? unpack_sum_of_words : unpack_sum)(sums(group, 0), parts_, sums_floats_, g_.count, stack_.first.columns,
                                                  columns_.piece(item % columns_.pieces()),
                                                  y_ + group * g_.count * stack_.first.columns);
    }
  }

 private:
  float* packed(size_t group) const { return packed_ + group * packed_floats_; }
  float* sums(size_t group, size_t part) const { return sums_ + (group * parts_ + part) * sums_floats_; }

  void accumulate(size_t group, size_t part, size_t slab_index) const {
    const Layer layer = stack_.of_group(group);
    const Range rows = split_.rows(layer, part);
    if (whole_) {
      float* const y = sums(group, part);
      std::fill_n(y, sums_floats_, 0.0f);
      return kernels().add_transposed_whole_rows(layer, packed(group), g_.count, y, rows);
    }
    if (g_.count <= kSingleVectors) {
      float* const y = sums(group, part) + slab_index * vector_stride(layer.columns);
      std::fill_n(y, layer.columns, 0.0f);
      kernels().add_transposed_with_vector(layer, packed(group) + slab_index * vector_stride(layer.rows), y, rows);
      return;
    }
    const Slab in = slab_at(slab_index, g_.count, layer.rows);
    const Slab out = slab_at(slab_index, g_.count, layer.columns);
    float* const y = sums(group, part) + out.offset;
    std::fill_n(y, out.width * layer.columns, 0.0f);
    const auto add = is_matrix(layer, g_.count) ? kernels().add_transposed_matrix : kernels().add_transposed;
    add(layer, packed(group) + in.offset, y, out.width, rows, workspace());
  }

  Stack stack_;
  Vectors g_;
  float* y_;
  float* packed_;
  size_t packed_floats_;
  float* sums_;
  bool whole_;
  size_t sums_floats_;
  size_t parts_;
  size_t slabs_;
  RowSplit split_;
  Chunks rows_;
  Chunks columns_;
};

class DecodePlan : public Plan {
 public:
  DecodePlan(const Stack& stack, void* out, Element element)
      : stack_(stack), out_(out), element_(element), rows_(stack.first.rows, kItemFloats / (stack.first.columns + 1)) {
    items_ = {stack.layers * rows_.pieces()};
    cost_ = static_cast<double>(stack.layers) * (0.4 * static_cast<double>(stack.first.capacity) +
                                                 0.3 * static_cast<double>(stack.first.rows * stack.first.columns));
  }

  void run(size_t, size_t item) const override {
    const size_t index = item / rows_.pieces();
    const Layer layer = stack_.layer(index);
    const Range rows = rows_.piece(item % rows_.pieces());
    const size_t first = (index * layer.rows + rows.begin) * layer.columns;
    if (element_ == Element::kFloat32) {
      kernels().decode(layer, static_cast<float*>(out_) + first, rows);
    } else {
      rounded(layer, static_cast<std::uint16_t*>(out_) + first, rows);
    }
  }

 private:
  // Row by row, so that float32 stays in a cache.
  static void rounded(const Layer& layer, std::uint16_t* out, Range rows) {
    const std::unique_ptr<float[]> dense(new float[layer.columns]);
    for (size_t row = rows.begin; row < rows.end; ++row, out += layer.columns) {
      kernels().decode(layer, dense.get(), {row, row + 1});
      kernels().to_bfloat16(dense.get(), out, layer.columns);
    }
  }

  Stack stack_;
  void* out_;
  Element element_;
  Chunks rows_;
};

class AttentionPlan : public Plan {
 public:
  AttentionPlan(const Attention& attention, float* out) : attention_(attention), out_(out) {
    items_ = {attention.batch * attention.heads};
    for (size_t b = 0; b < attention.batch; ++b) {
      cost_ += 0.15 * static_cast<double>(attention.heads * slots_of(attention, b) * attention.dim);
    }
  }

  void run(size_t, size_t item) const override { kernels().attend(attention_, out_, item, workspace()); }

 private:
  Attention attention_;
  float* out_;
};

}  // namespace

Layer Stack::layer(size_t i) const {
  Layer layer = first;
  layer.values += i * value_bytes(layer);
  if (layer.multipliers) layer.multipliers += i * layer.rows * groups_of(layer);
  layer.deltas += i * index_bytes(layer);
  if (layer.primes) layer.primes += i * layer.capacity;
  layer.scales += i * layer.rows;
  layer.row_pointers += i * (layer.rows + 1);
  return layer;
}

Layer Stack::of_group(size_t group) const {
  const std::int64_t last = static_cast<std::int64_t>(layers) - 1;
  return layer(static_cast<size_t>(std::clamp<std::int64_t>(index[group], 0, last)));
}

size_t product_scratch(const Stack& stack, size_t vectors) {
  // Enough for either manifold.
  const size_t columns = stack.first.columns, by_words = vectors <= kVectorsOfWholeRows ? vectors : 0;
  return stack.groups * larger(by_words * vector_stride(columns), packed_floats(vectors, columns)) + kAlignment;
}

size_t transposed_scratch(const Stack& stack, size_t vectors) {
  const size_t parts = transposed_parts(stack.first, vectors);
  return stack.groups * (packed_floats(vectors, stack.first.rows) + parts * packed_floats(vectors, stack.first.columns)) +
         kAlignment;
}

std::unique_ptr<Plan> product_plan(const Stack& stack, const Vectors& x, float* y, float* scratch) {
  return std::make_unique<ProductPlan>(stack, x, y, scratch);
}

std::unique_ptr<Plan> transposed_plan(const Stack& stack, const Vectors& g, float* y, float* scratch) {
  return std::make_unique<TransposedPlan>(stack, g, y, scratch);
}

std::unique_ptr<Plan> decode_plan(const Stack& stack, void* out, Element element) {
  return std::make_unique<DecodePlan>(stack, out, element);
}

std::unique_ptr<Plan> attention_plan(const Attention& attention, float* out) {
  return std::make_unique<AttentionPlan>(attention, out);
}

}  // namespace upg
