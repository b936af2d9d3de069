// Attention of a few new tokens over a long cache: a matter of reading the cache once, at full speed.
//
// The queries of all heads that share a key head, and of all new tokens, are the rows of one tile: so each
// key and value is read once for all of them. The keys of a sequence are split among blocks, and those of a
// block among its warps, each with a softmax of its own; what they found is put together at the end, in
// the order of the keys, by the block that finishes last. docs/kv_cache.md walks through.
#pragma once

#include "attention/fragments.cuh"
#include "attention/heads.cuh"
#include "attention/softmax.cuh"
#include "cache/decode_int8.cuh"
#include "cache/decode_keys.cuh"
#include "cache/decode_kernels.h"
#include "cache/decode_merge.cuh"
#include "cache/decode_tiles.h"

namespace almostgpt {

template <class T, class Stored>
struct DecodeArgs {
  HeadsOf<const T> q, q_sink;  // q_sink of no data: q
  HeadsOf<T> out;
  Global<const Stored> keys, values;
  Global<const float> key_scales, value_scales;
  Global<const int32_t> before, added;
  ScoreArgs scores;
  bool bent;  // by a softcap or ALiBi
  Global<const float> sink_logits;
  SplitSums sums;
  Ring ring;
  int window;
  int kv_heads, sharing, tokens, head_dim;  // sharing: query heads of a key head
  int row_blocks, splits;
};

// A row of the tile: one head of one token.
struct DecodeRow {
  int token, head;
  bool there;  // as a row, and as a token of this sequence

  template <class Args>
  DEVICE DecodeRow(const Args& a, int row, int kv_head, int added)
      : token(row / a.sharing), head(kv_head * a.sharing + row % a.sharing), there(token < added) {}
};

// Rows of queries into shared memory, 16 columns a time; what is not there becomes zeros.
template <bool int8, class Tile, class T, class Args>
DEVICE void load_queries(const Tile& tile, const HeadsOf<const T>& q, const Args& a, int batch, int kv_head,
                         int first_row) {
  for (int i = thread_id(); i < Tile::rows * Tile::columns / 16; i += block_size()) {
    const int row = i % Tile::rows, column = i / Tile::rows * 16;
    const DecodeRow at(a, first_row + row, kv_head, a.tokens);
    u32x4 low{}, high{};
    if (at.there && column < a.head_dim) {
      const Global<const T> data = q.head(batch, at.head) + (at.token * q.strides.row + column);
      low = load_global_as<u32x4, Cache::read_only>(data);
      high = load_global_as<u32x4, Cache::read_only>(data + 8);
    }
    if constexpr (int8) order_like_int8(low, high);
    store_shared(tile.at(row, column / 8), low);
    store_shared(tile.at(row, column / 8 + 1), high);
  }
}

// What the scores of a tile are, once the products are there: bent, and those that a row does not see gone.
// A lane has rows lane / 4 and 8 more of each 16, and columns 2 (lane % 4) and the next of every 8.
template <int row_tiles>
struct DecodeScores {
  int sees[row_tiles][2];  // the last position that a row sees; -1: none
  int first_row, kv_head;

  template <class Args>
  DEVICE DecodeScores(const Args& a, int first_row, int kv_head, int before, int added)
      : first_row(first_row + lane_id() / 4), kv_head(kv_head) {
    UNROLL for (int r = 0; r < row_tiles; ++r)
      UNROLL for (int half = 0; half < 2; ++half) {
        const DecodeRow at = row(a, r, half, added);
        sees[r][half] = at.there ? before + at.token : -1;
      }
  }

  // `position` of the tile's first column. For the distance to a sink no row stands beyond the window.
  // The slopes are read anew for each tile: kept, they would take more registers than there are.
  template <int score_tiles, class Args>
  DEVICE void bend(float (&scores)[row_tiles][score_tiles][4], const Args& a, int position, bool are_sinks) const {
    const int column = position + lane_id() % 4 * 2;
    UNROLL for (int r = 0; r < row_tiles; ++r)
      UNROLL for (int half = 0; half < 2; ++half) {
        const BentScore score(a.scores, row(a, r, half, a.tokens).head);
        const int here = are_sinks ? min(sees[r][half], a.window - 1) : sees[r][half];
        UNROLL for (int c = 0; c < score_tiles; ++c)
          UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e)
            scores[r][c][e] = score(scores[r][c][e], static_cast<float>(here - (column + 8 * c + e % 2)));
      }
  }

  // A row sees the sinks, of which there are `sinks`, or the last `in_window` positions up to its own.
  template <int score_tiles>
  DEVICE void mask(float (&scores)[row_tiles][score_tiles][4], int position, bool are_sinks, int sinks,
                   int in_window) const {
    const int column = position + lane_id() % 4 * 2;
    UNROLL for (int r = 0; r < row_tiles; ++r)
      UNROLL for (int half = 0; half < 2; ++half) {
        const int last = are_sinks ? min(sees[r][half], sinks - 1) : sees[r][half];
        const int first = are_sinks ? 0 : last - in_window + 1;
        UNROLL for (int c = 0; c < score_tiles; ++c)
          UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e) {
            const int key = column + 8 * c + e % 2;
            if (key < first || key > last) scores[r][c][e] = kMinusInfinity;
          }
      }
  }

 private:
  template <class Args>
  DEVICE DecodeRow row(const Args& a, int r, int half, int added) const {
    return {a, first_row + 16 * r + 8 * half, kv_head, added};
  }
};

template <class T, class Stored, class Tile>
KERNEL LAUNCH_BOUNDS(Tile::threads, Tile::blocks) decode_kernel(GRID_CONSTANT const DecodeArgs<T, Stored> a) {
  constexpr int row_tiles = Tile::row_tiles, score_tiles = kDecodeKeys / 8, out_tiles = Tile::head_dim / 8;
  constexpr bool int8 = Tile::int8;
  const int lane = lane_id(), warp = warp_id();

  // Blocks of the same keys begin together: the later ones find them in the L2 cache.
  const int row_block = block_x() % a.row_blocks, split = block_x() / a.row_blocks % a.splits;
  const int group = block_x() / a.row_blocks / a.splits;  // of rows that read the same keys
  const int batch = group / a.kv_heads, kv_head = group % a.kv_heads;
  const int first_row = row_block * Tile::rows, rows = min(Tile::rows, a.tokens * a.sharing - first_row);

  const int before = tokens_before(a.before, batch);
  const int added = a.added ? min(a.tokens, load_global<Cache::read_only>(a.added + batch)) : a.tokens;
  const KeyTiles keys(a.ring, a.window, before, added > 0 ? before + added : 0);
  const int split_tiles = (keys.tiles() + a.splits - 1) / a.splits;
  const int first_tile = split * split_tiles, end_tile = min(keys.tiles(), first_tile + split_tiles);

  using QTile = SharedTile<Tile::rows, Tile::head_dim>;
  using KTile = SharedTile<kDecodeKeys, Tile::head_dim / (int8 ? 2 : 1)>;  // two int8 are as wide as a T
  const QTile q_tile{shared_base()}, q_sink_tile{shared_base() + Tile::query_bytes};
  const shared_addr stages = shared_base() + 2 * Tile::query_bytes + warp * (Tile::stages * 2 * Tile::key_bytes);
  const shared_addr scales = shared_base() + Tile::scales_at + warp * (Tile::stages * Tile::scale_bytes);
  const auto k_tile = [&](int stage) { return KTile{stages + stage * (2 * Tile::key_bytes)}; };
  const auto v_tile = [&](int stage) { return KTile{stages + stage * (2 * Tile::key_bytes) + Tile::key_bytes}; };
  const auto tile_scales = [&](int stage) { return Int8Scales{scales + stage * Tile::scale_bytes}; };

  const int64_t slots = int64_t{group} * a.ring.capacity;
  const auto fetch = [&](int tile, int stage) {
    if (tile < end_tile) {
      const SlotRun run = keys.slots_of(tile);
      copy_slots(k_tile(stage), v_tile(stage), a.keys + slots * a.head_dim, a.values + slots * a.head_dim, a.ring, run,
                 a.head_dim);
      if constexpr (int8) tile_scales(stage).copy(a.key_scales + slots, a.value_scales + slots, a.ring, run);
    }
    cp_async_commit();
  };
  UNROLL for (int stage = 0; stage < Tile::stages - 1; ++stage) fetch(first_tile + warp + stage * Tile::warps, stage);

  load_queries<int8>(q_tile, a.q, a, batch, kv_head, first_row);
  const bool own_sinks = a.q_sink.data && keys.are_sinks(first_tile);
  if (own_sinks) load_queries<int8>(q_sink_tile, a.q_sink, a, batch, kv_head, first_row);
  cta_sync();

  const DecodeScores<row_tiles> rules(a, first_row, kv_head, before, added);
  const float factor = a.bent ? 1.0f : a.scores.scale * kLog2E;  // from a score to log2

  float out[row_tiles][out_tiles][4] = {};
  OnlineSoftmax<row_tiles> softmax;
  constexpr bool units = int8 && std::is_same_v<T, fp16>;
  RowUnits<row_tiles> row_units;
  int stage = 0;
  UNROLL_BY(1)
  for (int tile = first_tile + warp; tile < end_tile; tile += Tile::warps) {
    cp_async_wait<Tile::stages - 2>();
    warp_sync();  // all lanes' copies of this tile are there, and none reads the stage before this one any more
    fetch(tile + (Tile::stages - 1) * Tile::warps, stage == 0 ? Tile::stages - 1 : stage - 1);

    // S = Q K^T
    const bool are_sinks = keys.are_sinks(tile);
    float scores[row_tiles][score_tiles][4] = {};
    const auto q_at = left(are_sinks && own_sinks ? q_sink_tile : q_tile);
    if constexpr (int8) multiply_int8<T>(scores, q_at, right(k_tile(stage)));
    else multiply<T>(scores, q_at, right(k_tile(stage)));

    float value_scale[4];  // of this lane's columns
    if constexpr (int8) {
      float key_scale[4];
      tile_scales(stage).keys(key_scale), tile_scales(stage).values(value_scale);
      UNROLL for (int r = 0; r < row_tiles; ++r)
        UNROLL for (int c = 0; c < score_tiles; ++c)
          UNROLL for (int e = 0; e < 4; ++e) scores[r][c][e] *= key_scale[2 * c + e % 2];
    }
    const int position = keys.position(tile);
    if (a.bent) rules.bend(scores, a, position, are_sinks);
    // Most tiles are seen by all rows. Rows that are not there may do as they like: nobody stores them.
    if (!keys.all_see(tile, before)) rules.mask(scores, position, are_sinks, keys.sinks, keys.in_window);
    softmax.add(scores, out, factor);

    // O += P V
    if constexpr (int8) {
      UNROLL for (int r = 0; r < row_tiles; ++r)
        UNROLL for (int c = 0; c < score_tiles; ++c)
          UNROLL for (int e = 0; e < 4; ++e) scores[r][c][e] *= value_scale[2 * c + e % 2];
      if constexpr (units) row_units.fit(scores, out);
    }
    uint32_t p[row_tiles][4];
    UNROLL for (int r = 0; r < row_tiles; ++r)
      UNROLL for (int c = 0; c < 2; ++c) {
        const float(&s)[4] = scores[r][c];
        pack_fragment<T>(p[r], c, s[0], s[1], s[2], s[3]);
      }
    if constexpr (int8) multiply_rows_int8<T>(out, p, right_turned(v_tile(stage)));
    else multiply_rows<T>(out, p, right_turned(v_tile(stage)), 0);
    stage = stage == Tile::stages - 1 ? 0 : stage + 1;
  }

  // Every copy has been waited for: what was fetched beyond the last tile was nothing.
  // What the warps found, put together; where the keys were split, as a part of what the blocks found.
  const shared_addr work = shared_base() + 2 * Tile::query_bytes;
  const WarpSums<Tile::head_dim, int8, Tile::warps, Tile::sum_stride> warps{work};
  const auto sink_of = [&](int row) {
    const int head = DecodeRow(a, first_row + row, kv_head, added).head;
    return a.sink_logits ? load_global<Cache::read_only>(a.sink_logits + head) * kLog2E : kMinusInfinity;
  };
  const auto store_out = [&](int row, int column, const f32x4& value) {
    const DecodeRow at(a, first_row + row, kv_head, added);
    if (column >= a.head_dim) return;
    const u32x2 pairs{pair_of(T(), value.x, value.y), pair_of(T(), value.z, value.w)};
    store_global_as<u32x2>(a.out.head(batch, at.head) + (at.token * a.out.strides.row + column),
                           at.there ? pairs : u32x2{});
  };
  const int64_t tile_group = int64_t{group} * a.row_blocks + row_block;
  UNROLL for (int r = 0; r < row_tiles; ++r) {
    cta_sync();  // nobody reads keys, or the sums before, any more
    UNROLL for (int half = 0; half < 2; ++half) {
      const auto row = softmax.finish(r, half, factor, kMinusInfinity);
      warps.store(warp, half, row.lse, units ? row.weight * row_units.unit[r][half] : row.weight, out[r]);
    }
    cta_sync();
    const int rows_here = min(kFragmentRows, rows - r * kFragmentRows);
    constexpr int vectors = Tile::head_dim / 4;
    for (int i = thread_id(); i < rows_here * vectors; i += Tile::threads) {
      const int row = i / vectors, column = i % vectors * 4, tile_row = r * kFragmentRows + row;
      if (a.splits == 1) {
        store_out(tile_row, column, warps.merged(row, column, sink_of(tile_row)).value);
      } else {
        const Merged merged = warps.merged(row, column, kMinusInfinity);
        a.sums.store(tile_group, split, a.splits, Tile::rows, tile_row, column, Tile::head_dim, merged);
      }
    }
  }
  if (a.splits == 1) return;
  if (!a.sums.last(tile_group, a.splits, shared_base())) return;
  constexpr int vectors = Tile::head_dim / 4;
  for (int i = thread_id(); i < rows * vectors; i += Tile::threads) {
    const int row = i / vectors, column = i % vectors * 4;
    store_out(row, column,
              a.sums.merged(tile_group, a.splits, Tile::rows, row, column, Tile::head_dim, sink_of(row)).value);
  }
}

// How many blocks a call has, and what they need of each other.
struct DecodePlan {
  int row_blocks, splits, rows, width;
};

// Calls f with the T, the Stored and the Tile of these inputs, and the plan.
template <int head_dim, class F>
int with_decode_plan(const DecodeInputs& inputs, const Card& card, F f) {
  const CacheShape& shape = inputs.shape;
  const auto planned = [&](auto t, auto stored, auto int8) {
    const int rows = shape.tokens * (shape.heads / shape.kv_heads);
    return with_decode_tile<head_dim, int8()>(card.shared_bytes_per_block, rows, [&](auto tile) {
      using Tile = decltype(tile);
      DecodePlan plan{};
      plan.rows = Tile::rows, plan.width = Tile::head_dim;
      plan.row_blocks = (rows + Tile::rows - 1) / Tile::rows;
      const int fit = card.shared_bytes_per_block / static_cast<int>(Tile::shared_bytes);
      const int64_t resident = fit < 1 ? 1 : min(fit, Tile::blocks);
      // By the most keys there can be, not by how many there are, which only the GPU knows.
      const int64_t tiles = (min(inputs.window + shape.tokens, shape.capacity) + kDecodeKeys - 1) / kDecodeKeys;
      plan.splits = split_keys(int64_t{shape.batch} * shape.kv_heads * plan.row_blocks,
                               resident * card.multiprocessors, tiles / (2 * Tile::warps));
      return f(t, stored, tile, plan);
    });
  };
  const auto typed = [&](auto t) {
    return shape.int8 ? planned(t, int8_t(), std::true_type()) : planned(t, t, std::false_type());
  };
  return shape.dtype == DType::bfloat16 ? typed(bf16()) : typed(fp16());
}

template <int head_dim>
int decode_workspace_sm80(const DecodeInputs& inputs, const Card& card, DecodeWorkspace* sizes) {
  return with_decode_plan<head_dim>(inputs, card, [&](auto, auto, auto, const DecodePlan& plan) {
    sizes->tickets = int64_t{inputs.shape.batch} * inputs.shape.kv_heads * plan.row_blocks;
    sizes->lse = plan.splits == 1 ? 0 : sizes->tickets * plan.splits * plan.rows;
    sizes->sums = sizes->lse * plan.width;
    return 0;
  });
}

template <int head_dim>
int decode_attention_sm80(const DecodeInputs& inputs, const DecodeScratch& scratch, Heads out, const Card& card,
                          void* stream) {
  return with_decode_plan<head_dim>(inputs, card, [&](auto t, auto stored, auto tile, const DecodePlan& plan) {
    using T = decltype(t);
    using Stored = decltype(stored);
    using Tile = decltype(tile);
    const CacheShape& shape = inputs.shape;
    DecodeArgs<T, Stored> args{};
    args.q = heads_of<T>(inputs.q), args.q_sink = heads_of<T>(inputs.q_sink), args.out = heads_of<T>(out);
    args.keys = Global<const Stored>(static_cast<const Stored*>(inputs.slots.keys));
    args.values = Global<const Stored>(static_cast<const Stored*>(inputs.slots.values));
    args.key_scales = Global<const float>(inputs.scales.keys);
    args.value_scales = Global<const float>(inputs.scales.values);
    args.before = Global<const int32_t>(inputs.lengths.before);
    args.added = Global<const int32_t>(inputs.lengths.added);
    args.scores = {inputs.scale, inputs.softcap, Global<const float>(inputs.alibi_slopes)};
    args.bent = inputs.softcap > 0.0f || inputs.alibi_slopes;
    args.sink_logits = Global<const float>(inputs.sink_logits);
    args.sums = {Global<float>(scratch.sums), Global<float>(scratch.lse),
                 Global<int32_t>(scratch.tickets).as<uint32_t>()};
    args.ring = {shape.capacity, shape.sink_tokens};
    args.window = inputs.window;
    args.kv_heads = shape.kv_heads, args.sharing = shape.heads / shape.kv_heads;
    args.tokens = shape.tokens, args.head_dim = shape.head_dim;
    args.row_blocks = plan.row_blocks, args.splits = plan.splits;
    const int64_t blocks = int64_t{shape.batch} * shape.kv_heads * plan.row_blocks * plan.splits;
    const LaunchShape launch_shape{{static_cast<unsigned>(blocks)}, Tile::threads, Tile::shared_bytes};
    return launch<decode_kernel<T, Stored, Tile>>(launch_shape, stream, args);
  });
}

}  // namespace almostgpt
