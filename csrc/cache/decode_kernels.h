// The decode kernels, as their callers see them.
#pragma once

#include "attention/heads.cuh"
#include "cache/cache.h"

namespace almostgpt {

template <int head_dim>
int decode_attention_sm80(const DecodeInputs& inputs, const DecodeScratch& scratch, Heads out, const Card& card,
                          void* stream);
template <int head_dim>
int decode_workspace_sm80(const DecodeInputs& inputs, const Card& card, DecodeWorkspace* sizes);

}  // namespace almostgpt
