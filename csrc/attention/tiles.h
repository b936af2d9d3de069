// How attention is cut into tiles, by head dimension and by the shared memory that a card gives a
// block: 99 KiB on cards of 8.6, 8.9 and 12.0, 163 KiB on 8.0, 227 KiB on 9.0 and 10.0. Plain C++.
//
// The registers set the limits: a thread has 255, and must hold its share of the sums (out, or dK and
// dV) in float32 next to a tile of scores. A warp that has 32 rows uses each fragment that it reads
// from shared memory for two tensor core instructions, one that has 16 rows for one; so 32 rows where
// the sums of 32 rows fit. docs/attention.md counts what that means.
#pragma once

#include <cstdint>
#include <type_traits>

namespace almostgpt {

constexpr int kKiB = 1024;
constexpr int kFragmentRows = 16;  // of a tensor core instruction's left operand

// Calls f with the width of the tiles, as a constant.
template <class F>
constexpr int with_width(int head_dim, F f) {
  if (head_dim <= 64) return f(std::integral_constant<int, 64>());
  if (head_dim <= 128) return f(std::integral_constant<int, 128>());
  return f(std::integral_constant<int, 256>());
}

// A block has `queries` rows of one head; keys and values pass by in tiles of `keys`, two of each in
// shared memory: one in use, one on its way. Each warp has its own rows.
template <int head_dim_, int queries_, int keys_, int warps_>
struct ForwardTile {
  static constexpr int head_dim = head_dim_, queries = queries_, keys = keys_, warps = warps_;
  static constexpr int threads = 32 * warps;
  static constexpr int row_tiles = queries / warps / kFragmentRows;  // a warp's
  static constexpr int blocks = threads <= 128 ? 2 : 1;              // on a multiprocessor, by registers
  static constexpr uint32_t query_bytes = queries * head_dim * 2;
  static constexpr uint32_t key_bytes = keys * head_dim * 2;
  static constexpr uint32_t range_bytes = queries * 8;  // what each row sees
  static constexpr uint32_t shared_bytes = query_bytes + 4 * key_bytes + range_bytes;
};

// Calls f with the tile. Of 49 KiB every card holds two blocks, of 65 KiB those that have 163 KiB; with
// 99 KiB one block has all, with twice the warps. (Tiles of 64 keys and 128 columns in 4 warps spilled.)
template <int head_dim, class F>
constexpr int with_forward_tile(int shared_bytes, F f) {
  if constexpr (head_dim == 64) {
    return f(ForwardTile<64, 128, 64, 4>());
  } else if constexpr (head_dim == 128) {
    return shared_bytes >= 131 * kKiB ? f(ForwardTile<128, 128, 32, 4>()) : f(ForwardTile<128, 128, 64, 8>());
  } else {
    static_assert(head_dim == 256);
    return shared_bytes >= 129 * kKiB ? f(ForwardTile<256, 128, 32, 8>()) : f(ForwardTile<256, 64, 32, 4>());
  }
}

// Of Hopper's forward: `consumers` warpgroups with 64 rows of queries each, and one that fetches for them.
// Keys and values have `stages` places each in shared memory. Up to width 128 the warpgroups take turns at
// the tensor cores, so that one computes its softmax while another multiplies; at 256, as in FlashAttention-3,
// they do not: a product is so long that its own warpgroup's softmax hides beside it.
template <int head_dim_, int consumers_, int keys_, int stages_ = 2>
struct HopperForwardTile {
  static constexpr int head_dim = head_dim_, consumers = consumers_, keys = keys_, stages = stages_;
  static constexpr int group_rows = 64;  // of a warpgroup: what a wgmma has
  static constexpr int queries = group_rows * consumers;
  static constexpr int threads = 128 * (1 + consumers);
  static constexpr bool take_turns = head_dim <= 128;
  // Of 65,536 registers, in eights: setmaxnreg moves them from the producer, who needs few, to the consumers.
  static constexpr int producer_registers = consumers == 2 ? 24 : 32;
  static constexpr int consumer_registers = consumers == 2 ? 240 : 160;
  // The block owns what it was launched with, and a consumer would wait for ever for more.
  static constexpr int launch_registers = 65536 / threads / 8 * 8;
  static_assert(producer_registers + consumers * consumer_registers <= (1 + consumers) * launch_registers);
  static constexpr uint32_t query_bytes = queries * head_dim * 2;
  static constexpr uint32_t key_bytes = keys * head_dim * 2;
  static constexpr uint32_t barrier_bytes = 16 * (1 + 2 * stages) + 16;  // and what tiles come
  // Where there is room, out has a place of its own, and the next queries come while it is being written;
  // else it takes that of the queries.
  static constexpr uint32_t least_bytes = query_bytes + 2 * stages * key_bytes + barrier_bytes;
  static constexpr bool out_apart = least_bytes + query_bytes <= 227 * kKiB;
  static constexpr uint32_t shared_bytes = least_bytes + (out_apart ? query_bytes : 0);
  static_assert(shared_bytes <= 227 * kKiB);
};

// What a call to Hopper's forward says of its tiles.
struct HopperCall {
  int queries, keys;
  int sharing;    // query heads of a key head
  bool all_keys;  // which every query sees
};

// Query heads that read one key head may be packed into one tile of queries, `pack` of them: rows are then
// tokens times heads. So many rows of a head are computed, those that round up to whole tiles included.
constexpr double hopper_rows(int queries, int pack, int tile_queries) {
  const int64_t tiles = (int64_t{queries} * pack + tile_queries - 1) / tile_queries;
  return static_cast<double>(tiles * tile_queries) / pack;
}
// Worth it where tiles of a head alone would be mostly empty, as with few queries; a pack divides 64 rows, and
// the heads that share. The largest that saves a tenth of the rows.
constexpr int hopper_pack(const HopperCall& call, int tile_queries) {
  int best = 1;
  for (int pack = 2; pack <= 64 && call.sharing % pack == 0; pack *= 2)
    if (hopper_rows(call.queries, pack, tile_queries) < 0.9 * hopper_rows(call.queries, best, tile_queries))
      best = pack;
  return best;
}

// A step costs about so many keys more than it has, in barriers, votes and rows' tops (an estimate).
constexpr int kStepKeys = 12;
constexpr int64_t hopper_steps_cost(int keys, int tile_keys) {
  return int64_t{keys + tile_keys - 1} / tile_keys * (tile_keys + kStepKeys);
}

// Calls f with the tile.
//
// Width 64: three warpgroups ask less of the L2 cache than two, 19 bytes a clock against 28; but where 192 rows
// round up much worse than 128 (1,024 tokens: to 1,152), two. To bend a score (`plain` is false) takes more
// registers than three have.
//
// Width 128: where every query sees all keys, wide tiles of keys save steps; where the range of keys ends within
// a tile, in causal attention say, narrow ones waste less of the last.
//
// scripts/attention_tiles.py lists what else there is room for, and what it would cost.
template <int head_dim, bool plain, class F>
constexpr int with_hopper_forward_tile(const HopperCall& call, F f) {
  if constexpr (head_dim == 64) {
    if constexpr (plain) {
      const auto rows = [&](int tile) { return hopper_rows(call.queries, hopper_pack(call, tile), tile); };
      if (0.95 * rows(192) <= rows(128)) return f(HopperForwardTile<64, 3, 128>());
    }
    return f(HopperForwardTile<64, 2, 128>());
  } else if constexpr (head_dim == 128) {
    const bool wide = call.all_keys && hopper_steps_cost(call.keys, 160) < hopper_steps_cost(call.keys, 128);
    return wide ? f(HopperForwardTile<128, 2, 160>()) : f(HopperForwardTile<128, 2, 128>());
  } else {
    static_assert(head_dim == 256);
    return f(HopperForwardTile<256, 2, 80>());
  }
}

// A block has `keys` keys of one head; the queries and the gradients of their outputs pass by in tiles
// of `queries`, in `stages`. Each warp has its own keys, and, where a warp's registers do not hold dK
// and dV of 16 keys, `depth_parts` warps share their keys, each with a part of the columns; they all
// compute the scores.
template <int head_dim_, int keys_, int queries_, int stages_, int warps_, int depth_parts_>
struct BackwardTile {
  static constexpr int head_dim = head_dim_, keys = keys_, queries = queries_, stages = stages_, warps = warps_;
  static constexpr int depth_parts = depth_parts_;
  static constexpr int threads = 32 * warps;
  static constexpr int blocks = threads <= 128 ? 2 : 1;  // on a multiprocessor, by registers
  static constexpr int row_tiles = keys / (warps / depth_parts) / kFragmentRows;
  static constexpr int columns = head_dim / depth_parts;  // of dK and dV in a warp
  static constexpr int pass = row_tiles == 1 ? 32 : 16;   // queries whose scores a warp holds at once
  // For dQ, the warps share the tile of `queries` x head_dim in parts of 32 rows.
  static constexpr int dq_columns = head_dim / (warps * 32 / queries);
  static constexpr uint32_t key_bytes = keys * head_dim * 2;
  static constexpr uint32_t query_bytes = queries * head_dim * 2;
  static constexpr uint32_t score_bytes = keys * queries * 2;
  static constexpr uint32_t row_bytes = queries * 4;
  static constexpr uint32_t range_bytes = keys * 8;  // who sees each key
  static constexpr uint32_t shared_bytes =
      2 * key_bytes + score_bytes + stages * (2 * query_bytes + 2 * row_bytes) + range_bytes;
};

template <int head_dim, class F>
constexpr int with_backward_tile(int shared_bytes, F f) {
  if constexpr (head_dim == 64) {
    // 82 KiB fit twice into 227 KiB, and once into 99 KiB; 163 KiB hold two blocks of one stage.
    return shared_bytes >= 134 * kKiB && shared_bytes < 166 * kKiB ? f(BackwardTile<64, 128, 64, 1, 4, 1>())
                                                                   : f(BackwardTile<64, 128, 64, 2, 4, 1>());
  } else if constexpr (head_dim == 128) {
    return shared_bytes >= 146 * kKiB ? f(BackwardTile<128, 128, 64, 2, 8, 1>())
                                      : f(BackwardTile<128, 64, 64, 1, 4, 1>());
  } else {
    static_assert(head_dim == 256);
    if (shared_bytes >= 202 * kKiB) return f(BackwardTile<256, 64, 64, 2, 8, 2>());
    return shared_bytes >= 138 * kKiB ? f(BackwardTile<256, 64, 64, 1, 8, 2>())
                                      : f(BackwardTile<256, 32, 32, 2, 4, 2>());
  }
}

// Rows of the workspaces between the backward kernels: every tile of queries divides this.
constexpr int kRowBlock = 64;

}  // namespace almostgpt
