// The table of kernels of one instruction set.
#pragma once

#include "attention.h"
#include "dense.h"
#include "matrix_product.h"
#include "narrow.h"
#include "product.h"
#include "transposed.h"
#include "vector_product.h"
#include "whole_rows.h"
#include "whole_rows_transposed.h"

namespace upg {
namespace {

template <class Isa>
constexpr Kernels kernels_of() {
  return {
      Isa::kName,
      product_with_vector<Isa>,
      product_of_whole_rows<Isa>,
      product<Isa>,
      matrix_product<Isa>,
      product_of_narrow<Isa>,
      add_transposed_with_vector<Isa>,
      add_transposed<Isa>,
      add_transposed_matrix<Isa>,
      add_transposed_whole_rows<Isa>,
      decode<Isa>,
      first_row_outside<Isa>,
      to_float<Isa>,
      to_bfloat16<Isa>,
      attend<Isa>,
  };
}

}  // namespace
}  // namespace upg
