// Tensors of heads, (B, H, T, D), as the kernels take them.
#pragma once

#include "attention/attention.h"
#include "torch/context.h"
#include "torch/tensors.h"

namespace almostgpt::binding {

// A tensor (B, H, T, D) that the kernels can read: in place, where its strides allow, or else a copy.
inline Tensor readable(const Tensor& tensor) {
  bool in_place = tensor.stride(3) == 1 || tensor.size(3) == 1;
  in_place = in_place && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < 3; ++d) in_place = in_place && (tensor.stride(d) % 8 == 0 || tensor.size(d) == 1);
  in_place = in_place && (tensor.stride(2) < kMaxRowStride || tensor.size(2) == 1);
  if (in_place) return tensor;
  const Tensor copy = torch::stable::contiguous(tensor);  // or the tensor itself, where it is contiguous but begins anywhere
  return copy.const_data_ptr() == tensor.const_data_ptr() ? torch::stable::clone(copy) : copy;
}

// Of a dimension of 1 nothing: its stride may be any number, odd or beyond 32 bits.
inline HeadStrides strides_of(const Tensor& tensor) {
  const auto stride = [&](int64_t d) { return tensor.size(d) == 1 ? 0 : tensor.stride(d); };
  return {stride(0), stride(1), stride(2)};
}

inline ConstHeads input(Context& context, const char* name, const Tensor& tensor) {
  return {context.input(name, tensor), strides_of(tensor)};
}
inline Heads output(Context& context, const char* name, const Tensor& tensor) {
  return {context.output(name, tensor), strides_of(tensor)};
}

// Shaped as `like`, (B, H, T, D), and (B, T, H, D) in memory: what a projection over all heads reads.
// With `parts` heads for each of its heads.
inline Tensor new_heads(const Tensor& like, int64_t parts = 1) {
  return torch::stable::transpose(torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1) * parts, like.size(3)}), 1, 2);
}

}  // namespace almostgpt::binding
