// A cache of keys and values, one layer's: appending new tokens, and attention of them over all of it.
//
// Which token lies in which slot, and what a query sees, is said in kernels/kv_cache.py. Pointers are
// device memory. Slots are (batch, kv_heads, capacity, head_dim), dense and aligned to 16 bytes, in
// the queries' type or int8; head_dim is a multiple of 16 up to 256. What comes and goes beside them is
// (batch, heads, tokens, head_dim), with strides as in attention.h. The launchers return 0 or an error
// for error_string, and do not wait for the GPU.
#pragma once

#include <cstdint>

#include "attention/attention.h"

namespace almostgpt {

struct CacheShape {
  int batch, heads, kv_heads;  // heads is a multiple of kv_heads: query head h reads h / (heads / kv_heads)
  int tokens;                  // new ones of each sequence
  int capacity, sink_tokens;   // slots; the first of them are for sinks
  int head_dim;
  DType dtype;  // bfloat16 or float16
  bool int8;    // the slots
};

struct CacheLengths {
  const int32_t* before;  // (batch,): tokens before the new ones
  const int32_t* added;   // (batch,): how many of the new ones are there; or null: all
};

template <class Data>
struct CacheSlots {
  Data* keys;
  Data* values;
};
template <class Float>
struct CacheScales {
  Float *keys, *values;  // (batch, kv_heads, capacity), or null without int8
};

struct AppendInputs {
  CacheShape shape;
  CacheLengths lengths;
  ConstHeads q, k, v;
  // (pairs,): what a pair of dimensions turns by for each position, in turns of 2^-64; null: by nothing.
  const uint64_t* turns;
  int pairs;
  int sink_position;  // the latest position that a query has for the sinks; below 0: no second copy of it
};
// With turns: q_out, and where there is a second copy q_sink, of q's shape.
int cache_append(const AppendInputs& inputs, CacheSlots<void> slots, CacheScales<float> scales, Heads q_out, Heads q_sink,
                 void* stream);

struct DecodeInputs {
  CacheShape shape;
  CacheLengths lengths;
  int window;  // positions that a query sees at most, sinks among them
  ConstHeads q;
  ConstHeads q_sink;  // data null: q
  CacheSlots<const void> slots;
  CacheScales<const float> scales;
  float scale, softcap;       // as in AttentionOptions
  const float* alibi_slopes;  // (heads,) or null
  const float* sink_logits;   // (heads,) or null
};

// What blocks of the kernel write for each other, in elements.
struct DecodeWorkspace {
  int64_t sums;     // float32
  int64_t lse;      // float32
  int64_t tickets;  // int32, zeros before and after
};
int decode_workspace(const DecodeInputs& inputs, DecodeWorkspace* sizes);

struct DecodeScratch {
  float *sums, *lse;
  int32_t* tickets;
};
int decode_attention(const DecodeInputs& inputs, const DecodeScratch& scratch, Heads out, void* stream);

}  // namespace almostgpt
