// The cache of keys and values on a processor: what kernels/kv_cache.py says, in float32, slots in float32
// or int8. Plain C++: callers divide the work among threads.
#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/dots.h"

namespace almostgpt::cpu {

// The slots (B, Hkv, C, width) of keys and values, contiguous; int8 with scales (B, Hkv, C), which are null
// of float32.
struct CacheSlots {
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
  int64_t kv_heads, capacity, width;
  int64_t sinks, reach;  // S and W
};

// (B, heads, T, D), the elements of D next to each other.
struct Heads {
  const float* data;
  int64_t batch_stride, head_stride, token_stride;

  const float* row(int64_t b, int64_t head, int64_t t) const {
    return data + b * batch_stride + head * head_stride + t * token_stride;
  }
};

struct Append {
  CacheSlots slots;
  Heads q, k, v;
  int64_t heads, tokens, head_dim;
  const int32_t* lengths = nullptr;      // (B,), tokens before these
  const int32_t* new_lengths = nullptr;  // (B,), how many of the tokens are there, or null: all
  const int64_t* turns = nullptr;        // (rotated / 2,), or null: nothing turns
  int64_t rotated = 0;
  float* q_out = nullptr;   // (B, H, T, D) contiguous, where there are turns
  float* q_sink = nullptr;  // the same, turned by min(position, reach - 1), or null
};

// Stores and turns the tokens [begin, end) of all B * T.
void append_tokens(const AttentionKernels& kernels, const Append& append, int64_t begin, int64_t end);

struct Decode {
  CacheSlots slots;
  const float* q;       // (B, H, T, width) contiguous
  const float* q_sink;  // the same, what scores the sinks
  int64_t heads, tokens;
  const int32_t* lengths = nullptr;
  const int32_t* new_lengths = nullptr;
  const float* alibi_slopes = nullptr;  // (H,) or null
  const float* sink_logits = nullptr;   // (H,) or null
  float scale = 1.0f, softcap = 0.0f;
  float* out = nullptr;  // (B, T, H, width) contiguous
};

// Attention of the key heads [begin, end) of all B * Hkv.
void decode_heads(const DotKernels& dots, const AttentionKernels& attention, const Decode& decode, int64_t begin,
                  int64_t end);

}  // namespace almostgpt::cpu
