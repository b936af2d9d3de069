// Attention over heads, softmax(q kT scale) v with the usual variations, and its gradients.
//
// Pointers are device memory. Tensors are (batch, heads, tokens, head_dim) with any strides that are
// multiples of 8 elements, contiguous along head_dim, and aligned to 16 bytes; head_dim is a multiple
// of 8 up to 256. Arithmetic is float32 whatever the type. The launchers return 0 or an error for
// error_string, and do not wait for the GPU.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace almostgpt {

struct AttentionShape {
  int batch, heads, kv_heads;  // heads is a multiple of kv_heads: query head h reads h / (heads / kv_heads)
  int queries, keys;           // tokens, below 2^29; in backward at least 1 of each
  int head_dim;
  DType dtype;  // bfloat16 or float16
};

// Elements from one batch entry, head and token to the next; `row` of an input is below kMaxRowStride.
struct HeadStrides {
  int64_t batch = 0, head = 0, row = 0;
};
constexpr int64_t kMaxRowStride = 1 << 23;
struct ConstHeads {
  const void* data = nullptr;
  HeadStrides strides;
};
struct Heads {
  void* data = nullptr;
  HeadStrides strides;
};

struct AttentionOptions {
  // Query i sees the keys from i + keys - queries - left to i + keys - queries + right; below 0: open.
  int64_t window_left = -1, window_right = -1;
  float scale = 1.0f;
  float softcap = 0.0f;                 // above 0: scores become softcap tanh(score / softcap)
  const float* alibi_slopes = nullptr;  // (heads,): scores lose slope |i + keys - queries - j|
  const float* sink_logits = nullptr;   // (heads,): one more logit in each row's softmax, without a value
  // (documents + 1,), from 0 to keys, not decreasing: tokens see those of their own document alone.
  const int32_t* cu_seqlens = nullptr;
  int documents = 0;
};

struct AttentionInputs {
  AttentionShape shape;
  AttentionOptions options;
  ConstHeads q, k, v;
};

// out like q; lse (batch, heads, queries): the logarithm of each row's sum of exp(score), with the sink.
int attention_forward(const AttentionInputs& inputs, Heads out, float* lse, void* stream);
// The same by mma.sync, as on every card, where attention_forward would take Hopper's own kernel: to compare them.
int attention_forward_mma(const AttentionInputs& inputs, Heads out, float* lse, void* stream);

struct AttentionGradients {
  ConstHeads out, dout;
  const float* lse;
  const float* dlse;  // or null
  Heads dq;           // like q
  Heads dk, dv;       // like k and v, but with key_parts heads for each of theirs, which are to be summed
  float* dsink;       // (heads,), or null without sinks
  bool deterministic;
};

// What the backward kernels write for each other, in elements.
struct AttentionWorkspace {
  int64_t rows;    // float32, twice: one value for each query of each head, padded
  int64_t dq;      // float32
  int64_t sinks;   // float32; 0 without sinks
  int64_t turns;   // int32; 0 unless deterministic
  // The query heads of a key head are shared among so many blocks, each with gradients of its own: more
  // than one where a card would have multiprocessors left over.
  int key_parts;
};
int attention_workspace(const AttentionInputs& inputs, bool deterministic, AttentionWorkspace* sizes);

struct AttentionScratch {
  float *lse2, *delta, *dq, *sinks;
  int32_t* turns;
};
// key_parts: as attention_workspace gave it; dk and dv have so many heads.
int attention_backward(const AttentionInputs& inputs, const AttentionGradients& gradients,
                       const AttentionScratch& scratch, int key_parts, void* stream);

}  // namespace almostgpt
