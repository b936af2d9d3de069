// FlashAttention forward with mma.sync, for every card since sm_80 (Dao, arXiv:2307.08691).
//
// A block has a tile of one head's queries. Tiles of keys and values pass by: for each, the scores of
// the queries, their softmax as far as it is known, and their part of the output, which is held in
// registers. Nothing of the size of queries x keys is ever in memory. docs/attention.md walks through.
#pragma once

#include "attention/forward.cuh"
#include "attention/fragments.cuh"
#include "attention/softmax.cuh"

namespace almostgpt {

template <class T>
struct ForwardArgs {
  HeadsOf<const T> q, k, v;
  HeadsOf<T> out;
  Global<float> lse;  // (batch, heads, queries)
  Mask mask;
  ScoreArgs scores;
  Global<const float> sink_logits;
  Schedule schedule;
  int heads, sharing, head_dim;  // sharing: query heads of a key head
};

template <class T, class Tile, class Score>
KERNEL LAUNCH_BOUNDS(Tile::threads, Tile::blocks) attention_forward_kernel(GRID_CONSTANT const ForwardArgs<T> a) {
  constexpr int row_tiles = Tile::row_tiles, warp_rows = row_tiles * kFragmentRows;
  constexpr int score_tiles = Tile::keys / 8, out_tiles = Tile::head_dim / 8;
  const int lane = lane_id(), queries = a.mask.queries, keys = a.mask.keys;

  const Schedule::Work work = a.schedule.work(block_x());
  const int batch = work.head / a.heads, head = work.head % a.heads, kv_head = head / a.sharing;
  const int first_query = (a.schedule.tiles - 1 - work.tile) * Tile::queries;  // the last see the most
  const int last_query = min(first_query + Tile::queries, queries) - 1;

  using QTile = SharedTile<Tile::queries, Tile::head_dim>;
  using KTile = SharedTile<Tile::keys, Tile::head_dim>;
  const QTile q_tile{shared_base()};
  const auto k_tile = [](int tile) { return KTile{shared_base() + Tile::query_bytes + tile % 2 * (2 * KTile::bytes)}; };
  const auto v_tile = [&](int tile) { return KTile{k_tile(tile).base + KTile::bytes}; };

  const Rows<T> k = a.k.rows(batch, kv_head, keys, a.head_dim), v = a.v.rows(batch, kv_head, keys, a.head_dim);
  const auto fetch = [&](int tile) {
    copy_async<Tile::threads>(k_tile(tile), k.from(tile * Tile::keys));
    copy_async<Tile::threads>(v_tile(tile), v.from(tile * Tile::keys));
    cp_async_commit();
  };

  copy_async<Tile::threads>(q_tile, a.q.rows(batch, head, queries, a.head_dim).from(first_query));
  // While the queries come: what the rows see. Rows beyond the last are taken for it, and not stored.
  const Ranges seen{shared_base() + Tile::query_bytes + 4 * KTile::bytes};
  seen.fill(Tile::queries, [&](int row) { return a.mask.keys_of(min(first_query + row, last_query)); });
  cta_sync();
  const int first_key = seen[0].begin, end_key = seen[last_query - first_query].end;
  const int first_tile = first_key / Tile::keys;
  const int end_tile = end_key > first_key ? (end_key + Tile::keys - 1) / Tile::keys : first_tile;

  const int warp_row = warp_id() * warp_rows;  // of this warp's own rows, the first in the tile
  const bool warp_works = first_query + warp_row <= last_query;
  const Score score(a.scores, head);

  float out[row_tiles][out_tiles][4] = {};
  OnlineSoftmax<row_tiles> softmax;
  const auto q_at = left(q_tile, warp_row);

  if (first_tile < end_tile) fetch(first_tile);
  UNROLL_BY(1)
  for (int tile = first_tile; tile < end_tile; ++tile) {
    cp_async_wait<0>();
    cta_sync();  // everybody's copies of this tile are there, and nobody reads the tile before any more …
    if (tile + 1 < end_tile) fetch(tile + 1);  // … whose place the next one takes
    const int first = tile * Tile::keys;  // of its keys
    const Range first_sees = seen[warp_row], last_sees = seen[warp_row + warp_rows - 1];
    if (!warp_works || first >= last_sees.end || first + Tile::keys <= first_sees.begin) continue;
    const bool whole = first >= last_sees.begin && first + Tile::keys <= first_sees.end;

    // S = Q K^T
    float scores[row_tiles][score_tiles][4] = {};
    multiply<T>(scores, q_at, right(k_tile(tile)));

    // This lane's first column and row; its others are 8 columns, or 8 rows, further.
    const int column = first + 2 * (lane % 4), row = warp_row + lane / 4;
    UNROLL for (int r = 0; r < row_tiles; ++r)
      UNROLL for (int half = 0; half < 2; ++half) {
        const int here = row + 16 * r + 8 * half;
        if constexpr (!Score::plain) {
          const float ahead = static_cast<float>(first_query + here + a.mask.diagonal() - column);
          UNROLL for (int c = 0; c < score_tiles; ++c)
            UNROLL for (int e = 0; e < 2; ++e) {
              float& value = scores[r][c][2 * half + e];
              value = score(value, ahead - static_cast<float>(8 * c + e));
            }
        }
        if (!whole) {
          const Range range = seen[here];
          UNROLL for (int c = 0; c < score_tiles; ++c)
            UNROLL for (int e = 0; e < 2; ++e)
              if (!range.has(column + 8 * c + e)) scores[r][c][2 * half + e] = kMinusInfinity;
        }
      }
    softmax.add(scores, out, score.factor);

    // O += P V. The fragments of two tiles of P, as they were computed, are those of one left operand.
    const auto v_at = right_turned(v_tile(tile));
    UNROLL for (int c = 0; c < score_tiles; c += 2) {
      uint32_t p[row_tiles][4];
      UNROLL for (int r = 0; r < row_tiles; ++r)
        UNROLL for (int part = 0; part < 2; ++part) {
          const float(&s)[4] = scores[r][c + part];
          pack_fragment<T>(p[r], part, s[0], s[1], s[2], s[3]);
        }
      multiply_rows<T>(out, p, v_at, 8 * c);
    }
  }
  if (first_tile == end_tile) {  // the queries, which nobody has waited for
    cp_async_commit();
    cp_async_wait<0>();
    cta_sync();
  }
  if (!warp_works) return;

  // Through the warp's own rows of the queries' tile, so that each store is 16 bytes of one row.
  const float sink = a.sink_logits ? load_global<Cache::read_only>(a.sink_logits + head) * kLog2E : kMinusInfinity;
  const Global<float> lse = a.lse + ((int64_t{batch} * a.heads + head) * queries + first_query);
  UNROLL for (int r = 0; r < row_tiles; ++r)
    UNROLL for (int half = 0; half < 2; ++half) {
      const auto finished = softmax.finish(r, half, score.factor, sink);
      const int row = warp_row + 16 * r + 8 * half + lane / 4;
      if (lane % 4 == 0 && first_query + row <= last_query) store_global(lse + row, finished.lse);
      UNROLL for (int d = 0; d < out_tiles; ++d)
        UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e) out[r][d][e] *= finished.weight;
    }
  store_fragments<T>(q_tile, out, warp_row, 0);
  warp_sync();
  write_rows<32, warp_rows>(q_tile, warp_row, a.out.head(batch, head) + first_query * a.out.strides.row,
                            a.out.strides.row, last_query - first_query + 1, a.head_dim, lane);
}

template <int head_dim>
int attention_forward_sm80(const AttentionInputs& inputs, Heads out, float* lse, const Card& card, void* stream) {
  const AttentionShape& shape = inputs.shape;
  return with_forward_tile<head_dim>(card.shared_bytes_per_block, [&](auto tile) {
    return with_types<head_dim>(inputs, [&](auto type, auto* score) {
      using Tile = decltype(tile);
      using T = decltype(type);
      using Score = std::remove_pointer_t<decltype(score)>;
      const int sharing = shape.heads / shape.kv_heads;
      const int64_t pair_bytes = int64_t{4} * shape.keys * shape.head_dim;  // of keys and values
      ForwardArgs<T> args{};
      args.q = heads_of<T>(inputs.q), args.k = heads_of<T>(inputs.k), args.v = heads_of<T>(inputs.v);
      args.out = heads_of<T>(out);
      args.lse = Global<float>(lse);
      args.mask = make_mask(shape, inputs.options);
      args.scores = make_scores(inputs.options);
      args.sink_logits = Global<const float>(inputs.options.sink_logits);
      args.schedule = make_schedule(shape.queries, Tile::queries, shape.batch * shape.heads, sharing, pair_bytes);
      args.heads = shape.heads, args.sharing = sharing, args.head_dim = shape.head_dim;
      const LaunchShape launch_shape{{args.schedule.blocks()}, Tile::threads,
                                     Tile::shared_bytes};
      return launch<attention_forward_kernel<T, Tile, Score>>(launch_shape, stream, args);
    });
  });
}

}  // namespace almostgpt
