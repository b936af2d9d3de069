// The way from a call to the kernels of its head dimension.

#include "attention/attention.h"

#include "attention/backward.cuh"
#include "attention/forward.cuh"

namespace almostgpt {
namespace {

int plan_backward(const AttentionShape& shape, bool deterministic, const Card& card, BackwardPlan* plan) {
  return with_width(shape.head_dim, [&](auto width) {
    return with_backward_tile<width()>(card.shared_bytes_per_block, [&](auto tile) {
      using Tile = decltype(tile);
      plan->width = Tile::head_dim;
      plan->padded_rows = (shape.queries + kRowBlock - 1) / kRowBlock * kRowBlock;
      plan->tile_queries = Tile::queries, plan->tile_keys = Tile::keys;
      // Enough blocks for all multiprocessors, as far as there are heads.
      const int resident = min(Tile::blocks, card.shared_bytes_per_block / static_cast<int>(Tile::shared_bytes));
      const int64_t slots = int64_t{card.multiprocessors} * resident, sharing = shape.heads / shape.kv_heads;
      const int64_t blocks = int64_t{shape.batch} * shape.kv_heads * ((shape.keys + Tile::keys - 1) / Tile::keys);
      plan->key_parts = 1;
      for (int parts = 1; parts <= sharing && blocks * plan->key_parts < slots; ++parts)
        if (sharing % parts == 0) plan->key_parts = parts;
      // In order nothing is atomic; otherwise sums of four floats at once begin with sm_90.
      plan->dq_order = {deterministic || card.major >= 9};
      return 0;
    });
  });
}

int forward_mma(const AttentionInputs& inputs, Heads out, float* lse, const Card& card, void* stream) {
  return with_width(inputs.shape.head_dim, [&](auto width) {
    return attention_forward_sm80<width()>(inputs, out, lse, card, stream);
  });
}

}  // namespace

int attention_forward(const AttentionInputs& inputs, Heads out, float* lse, void* stream) {
  Card card;
  if (const int error = current_card(card)) return error;
#if defined(ALMOSTGPT_SM90)
  if (is_for_hopper(inputs, card)) {
    const int result = with_width(inputs.shape.head_dim, [&](auto width) {
      return attention_forward_sm90<width()>(inputs, out, lse, card, stream);
    });
    if (result != kNoMap) return result;
  }
#endif
  return forward_mma(inputs, out, lse, card, stream);
}

int attention_forward_mma(const AttentionInputs& inputs, Heads out, float* lse, void* stream) {
  Card card;
  if (const int error = current_card(card)) return error;
  return forward_mma(inputs, out, lse, card, stream);
}

int attention_workspace(const AttentionInputs& inputs, bool deterministic, AttentionWorkspace* sizes) {
  Card card;
  BackwardPlan plan;
  if (const int error = current_card(card)) return error;
  if (const int error = plan_backward(inputs.shape, deterministic, card, &plan)) return error;
  sizes->rows = int64_t{inputs.shape.batch} * inputs.shape.heads * plan.padded_rows;
  sizes->dq = sizes->rows * plan.width;
  sizes->sinks = inputs.options.sink_logits ? sizes->rows / kRowBlock : 0;
  sizes->turns = deterministic ? 1 + sizes->rows / plan.tile_queries : 0;
  sizes->key_parts = plan.key_parts;
  return 0;
}

int attention_backward(const AttentionInputs& inputs, const AttentionGradients& gradients,
                       const AttentionScratch& scratch, int key_parts, void* stream) {
  Card card;
  BackwardPlan plan;
  if (const int error = current_card(card)) return error;
  if (const int error = plan_backward(inputs.shape, gradients.deterministic, card, &plan)) return error;
  plan.key_parts = key_parts;
  if (const int error = attention_prepare_backward(inputs, gradients, scratch, plan, stream)) return error;
  const int error = with_width(inputs.shape.head_dim, [&](auto width) {
    return attention_backward_sm80<width()>(inputs, gradients, scratch, plan, card, stream);
  });
  return error ? error : attention_finish_backward(inputs, gradients, scratch, plan, stream);
}

}  // namespace almostgpt
