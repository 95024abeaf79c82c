// An operation cut into items that threads may take in any order.
//
// A plan has phases; all items of a phase are done before the next one begins. Items and their results depend on
// shapes and data only, never on the number of threads: each item owns the rows, columns or vectors that it writes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "slabs.h"

namespace upg {

class Plan {
 public:
  virtual ~Plan() = default;
  // At least one item in each phase.
  const std::vector<size_t>& items() const { return items_; }
  // About how many nanoseconds one thread takes.
  double cost() const { return cost_; }
  virtual void run(size_t phase, size_t item) const = 0;

 protected:
  std::vector<size_t> items_;
  double cost_ = 0;
};

// A stack of layers of one shape, and which of them each group of vectors uses.
struct Stack {
  Layer first;
  size_t layers;
  const std::int32_t* index;  // one per group; values outside the stack are clamped to it
  size_t groups;

  Layer layer(size_t i) const;
  Layer of_group(size_t group) const;
};

struct Vectors {
  const void* data;  // (groups, count, features)
  Element element;
  size_t count;  // in each group
};

// Floats of scratch memory that the plans below need; part of compiled programs, so the same on every machine.
size_t product_scratch(const Stack&, size_t vectors);
size_t transposed_scratch(const Stack&, size_t vectors);

// y (groups, count, rows) = x @ W.T
std::unique_ptr<Plan> product_plan(const Stack&, const Vectors& x, float* y, float* scratch);
// y (groups, count, columns) = g @ W
std::unique_ptr<Plan> transposed_plan(const Stack&, const Vectors& g, float* y, float* scratch);
// Every layer of the stack to dense: out (layers, rows, columns), float32 or bfloat16
std::unique_ptr<Plan> decode_plan(const Stack&, void* out, Element);
// out (batch, heads, dim)
std::unique_ptr<Plan> attention_plan(const Attention&, float* out);

}  // namespace upg
