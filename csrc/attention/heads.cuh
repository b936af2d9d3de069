// Tensors of heads as kernels take them, and which block works on what.
#pragma once

#include "attention/attention.h"
#include "attention/mask.cuh"
#include "attention/scores.cuh"
#include "attention/shared_tile.cuh"
#include "attention/tiles.h"
#include "device/device.cuh"

namespace almostgpt {

using namespace device;

// (batch, heads, rows, head_dim).
template <class T>
struct HeadsOf {
  Global<T> data;
  HeadStrides strides;

  DEVICE Global<T> head(int batch, int head) const {
    return data + (batch * strides.batch + head * strides.head);
  }
  DEVICE auto rows(int batch, int head, int count, int columns) const {
    return Rows<std::remove_const_t<T>>{this->head(batch, head), static_cast<int>(strides.row), count, columns};
  }
};
template <class T>
HeadsOf<const T> heads_of(const ConstHeads& heads) {
  return {Global<const T>(static_cast<const T*>(heads.data)), heads.strides};
}
template <class T>
HeadsOf<T> heads_of(const Heads& heads) {
  return {Global<T>(static_cast<T*>(heads.data)), heads.strides};
}

// The tiles of all heads, in the order in which blocks begin: heads in groups, so small that what all their
// tiles read stays in the L2 cache, and in a group the heaviest tiles of a causal mask before the light
// ones, so that at the end no block has much left to do alone.
struct Schedule {
  int tiles;        // of a head
  int heads;        // in all batch entries
  int group_heads;  // a multiple of the query heads of a key head

  struct Work { int tile, head; };
  DEVICE Work work(int block) const {
    const int group = block / (group_heads * tiles), first = group * group_heads;
    const int here = min(group_heads, heads - first), place = block - first * tiles;
    return {place / here, first + place % here};
  }
  HOST_DEVICE unsigned blocks() const { return static_cast<unsigned>(tiles) * static_cast<unsigned>(heads); }
};

// Half of the L2 cache of an A100 (40 MB), two fifths of an H200's (50 MB); the rest is for what passes through.
constexpr int64_t kGroupBytes = 20 << 20;

// `sharing` heads read the same `bytes`, again and again.
inline Schedule make_schedule(int tokens, int tile, int heads, int sharing, int64_t bytes) {
  const int64_t fit = kGroupBytes / (bytes + 1), all = heads / sharing;
  const int64_t group = fit < 1 ? 1 : fit < all ? fit : all;
  return {(tokens + tile - 1) / tile, heads, static_cast<int>(group) * sharing};
}

inline Mask make_mask(const AttentionShape& shape, const AttentionOptions& options) {
  const int64_t open = int64_t{shape.queries} + shape.keys;
  const auto side = [&](int64_t width) { return static_cast<int>(width < 0 || width > open ? open : width); };
  return {shape.queries,
          shape.keys,
          side(options.window_left),
          side(options.window_right),
          Global<const int32_t>(options.cu_seqlens),
          options.cu_seqlens ? options.documents : 0};
}

inline ScoreArgs make_scores(const AttentionOptions& options) {
  return {options.scale, options.softcap, Global<const float>(options.alibi_slopes)};
}
// Where a score is but scaled: the maximum of the products is then that of the scores, too.
inline bool is_plain(const AttentionOptions& options) {
  return options.softcap <= 0.0f && !options.alibi_slopes && options.scale > 0.0f;
}

// Calls f with a T and a Score. With mma.sync, at 256, a multiplication more for each score is nothing beside
// the products, and one kernel serves for both; wgmma is so fast that it is not.
template <int head_dim, bool plain_too = (head_dim < 256), class F>
int with_types(const AttentionInputs& inputs, F f) {
  const auto typed = [&](auto t) {
    if constexpr (plain_too) {
      if (is_plain(inputs.options)) return f(t, static_cast<PlainScore*>(nullptr));
    }
    return f(t, static_cast<BentScore*>(nullptr));
  };
  return inputs.shape.dtype == DType::bfloat16 ? typed(bf16()) : typed(fp16());
}

}  // namespace almostgpt
