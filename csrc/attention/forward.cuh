// The forward kernels, as their callers see them.
#pragma once

#include "attention/heads.cuh"

namespace almostgpt {

template <int head_dim>
int attention_forward_sm80(const AttentionInputs& inputs, Heads out, float* lse, const Card& card, void* stream);

}  // namespace almostgpt
