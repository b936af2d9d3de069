// The way from a call to the kernel of its head dimension.

#include "cache/decode_kernels.h"

namespace almostgpt {

int decode_workspace(const DecodeInputs& inputs, DecodeWorkspace* sizes) {
  Card card;
  if (const int error = current_card(card)) return error;
  return with_width(inputs.shape.head_dim,
                    [&](auto width) { return decode_workspace_sm80<width()>(inputs, card, sizes); });
}

int decode_attention(const DecodeInputs& inputs, const DecodeScratch& scratch, Heads out, void* stream) {
  Card card;
  if (const int error = current_card(card)) return error;
  return with_width(inputs.shape.head_dim, [&](auto width) {
    return decode_attention_sm80<width()>(inputs, scratch, out, card, stream);
  });
}

}  // namespace almostgpt
