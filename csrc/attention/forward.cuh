// The forward kernels, as their callers see them.
#pragma once

#include "attention/heads.cuh"

namespace almostgpt {

template <int head_dim>
int attention_forward_sm80(const AttentionInputs& inputs, Heads out, float* lse, const Card& card, void* stream);

// Whether Hopper's kernel takes it: on 9.0 alone, and where TMA can bring the tensors. What its descriptors
// cannot say, or are not known to: a stride of 0, as an expanded tensor has (the driver's rules leave it open),
// 2^40 bytes from one entry to the next, and no entries at all. All other strides are multiples of 16 bytes
// anyway (attention.h). kernels/flash_attention.py says the same to who asks beforehand.
inline bool is_for_hopper(const AttentionInputs& inputs, const Card& card) {
  const AttentionShape& shape = inputs.shape;
  const auto has_map = [&](const HeadStrides& strides, int heads, int rows) {
    const auto fits = [](int64_t stride, int size) { return size == 1 || (stride > 0 && stride < int64_t{1} << 39); };
    return fits(strides.batch, shape.batch) && fits(strides.head, heads) && fits(strides.row, rows);
  };
  return card.major == 9 && shape.keys > 0 && has_map(inputs.q.strides, shape.heads, shape.queries) &&
         has_map(inputs.k.strides, shape.kv_heads, shape.keys) && has_map(inputs.v.strides, shape.kv_heads, shape.keys);
}

// Where is_for_hopper. kNoMap, and nothing done, if the driver refuses a map all the same.
constexpr int kNoMap = -1;
template <int head_dim>
int attention_forward_sm90(const AttentionInputs& inputs, Heads out, float* lse, const Card& card, void* stream);

}  // namespace almostgpt
