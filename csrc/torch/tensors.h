// What bindings ask of tensors: element types, shapes, and rows.
// Torch is reached through its stable ABI only, so that one build runs under any torch >= 2.10.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "runtime.h"

namespace almostgpt::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be bfloat16, float16 or float32");
  }
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// A tensor (..., columns) as rows that lie one stride apart, each of them contiguous.
struct Rows {
  Tensor tensor;  // keeps the memory alive
  int64_t rows = 1;
  int64_t columns = 1;
  int64_t stride = 0;  // in elements
};

// Reads the tensor in place where its strides allow, otherwise from a contiguous copy.
inline Rows rows_of(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  Rows result{tensor, 1, tensor.size(last), 0};
  bool in_place = result.columns == 1 || tensor.stride(last) == 1;
  // From the innermost leading dimension outwards, each stride must continue the ones within.
  for (int64_t d = last - 1; d >= 0; --d) {
    const int64_t size = tensor.size(d);
    if (size == 1) continue;
    if (result.rows == 1) result.stride = tensor.stride(d);
    else if (tensor.stride(d) != result.rows * result.stride) in_place = false;
    result.rows *= size;
  }
  if (!in_place) {
    result.tensor = torch::stable::contiguous(tensor);
    result.stride = result.columns;
  }
  return result;
}

}  // namespace almostgpt::binding
