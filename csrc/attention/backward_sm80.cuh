// FlashAttention backward with mma.sync, for every card since sm_80 (Dao, arXiv:2307.08691, algorithm 2).
//
//   P = exp(S - lse)   dV = P^T dO   dP = dO V^T   dS = P (dP - delta)   dK = dS^T Q   dQ = dS K
//
// A block has a tile of one head's keys and values, and holds their gradients in registers. The queries
// of the heads that read them pass by in tiles. Scores are computed transposed, keys by queries: then P^T
// and dS^T, as the tensor cores leave them in registers, are the left operands of the next products.
// Only dS goes through shared memory, since dQ is a sum over keys, which are in different warps, and,
// through global memory, in different blocks.
#pragma once

#include "attention/backward.cuh"

namespace almostgpt {

// The number of this block among those that have begun, in all of its threads.
DEVICE int next_ticket(Global<int32_t> tickets, shared_addr memory) {
  if (thread_id() == 0)
    store_shared<uint32_t>(memory, atomic_add(tickets.as<uint32_t>(), 1u));
  cta_sync();
  const int ticket = load_shared<int32_t>(memory);
  cta_sync();
  return ticket;
}

// dQ += dS K for a tile of queries, each warp 32 rows and a part of the columns. In order, a block adds
// when its turn has come.
template <class T, class Tile>
DEVICE void add_dq(const BackwardArgs<T>& a, const BackwardMemory<Tile>& memory, int batch, int head, int query,
                   int key_tile) {
  constexpr int row_parts = Tile::queries / 32;
  const int row = warp_id() % row_parts * 32, first_column = warp_id() / row_parts * Tile::dq_columns;
  const auto ds_at = left_turned(memory.ds());
  // 32 columns at a time: the sums of 64 are too many registers beside dK and dV.
  UNROLL_BY(1)
  for (int column = first_column; column < first_column + Tile::dq_columns; column += 32) {
    float dq[2][4][4] = {};
    const auto k_at = right_turned(memory.k(), 0, column);
    UNROLL for (int key = 0; key < Tile::keys; key += 16) {
      uint32_t ds[2][4];
      UNROLL for (int r = 0; r < 2; ++r) ldmatrix_x4_trans(ds[r], ds_at.at(key, row / 8 + 2 * r));
      multiply_rows<T>(dq, ds, k_at, key, column / 8 % BackwardMemory<Tile>::KTile::chunks);
    }

    if (a.turns && column == first_column) {
      if (thread_id() == 0)
        while (load_acquire(a.template turn_of<Tile>(batch, head, query)) != key_tile) {}
      cta_sync();
    }
    const int64_t fragments = (a.row_of(batch, head) + query + row) / 16 * (Tile::head_dim / 8) + column / 8;
    const Global<float> start = a.dq + fragments * 128 + a.dq_order.at(lane_id(), 0);
    UNROLL for (int r = 0; r < 2; ++r)
      UNROLL for (int c = 0; c < 4; ++c) {
        const Global<float> to = start + (r * (Tile::head_dim / 8) + c) * 128;
        const float(&sums)[4] = dq[r][c];
        if (a.turns) {
          const f32x4 before = load_global_as<f32x4>(to);
          const f32x4 after{before.x + sums[0], before.y + sums[1], before.z + sums[2], before.w + sums[3]};
          store_global_as<f32x4>(to, after);
        } else if (a.dq_order.vectors) {
          reduce_add_f32x4(to, f32x4{sums[0], sums[1], sums[2], sums[3]});
        } else {
          UNROLL for (int e = 0; e < 4; ++e) reduce_add(to + 32 * e, sums[e]);
        }
      }
  }
  if (a.turns) {
    cta_sync();
    if (thread_id() == 0) store_release(a.template turn_of<Tile>(batch, head, query), key_tile + 1);
  }
}

template <class T, class Tile, class Score>
KERNEL LAUNCH_BOUNDS(Tile::threads, Tile::blocks) attention_backward_kernel(GRID_CONSTANT const BackwardArgs<T> a) {
  constexpr int row_tiles = Tile::row_tiles, warp_rows = row_tiles * kFragmentRows;
  constexpr int pass_tiles = Tile::pass / 8, column_tiles = Tile::columns / 8;
  const int lane = lane_id(), queries = a.mask.queries, keys = a.mask.keys;

  const BackwardMemory<Tile> memory;
  const auto k_tile = memory.k(), v_tile = memory.v();
  const auto ds_tile = memory.ds();
  const Ranges seen = memory.seen();

  // In order, tiles must be handed out in the order in which blocks begin: a block waits for earlier tiles.
  int block = block_x();
  if (a.turns) block = next_ticket(a.turns, seen.memory);  // where the ranges will be
  const Schedule::Work work = a.schedule.work(block);
  // A part of the query heads that read a key head; dk and dv have a head for each part.
  const int parts = a.kv_heads * a.key_parts, batch = work.head / parts, part = work.head % parts;
  const int kv_head = part / a.key_parts, heads = a.heads / parts;
  const int first_key = work.tile * Tile::keys, last_key = min(first_key + Tile::keys, keys) - 1;

  copy_async<Tile::threads>(k_tile, a.k.rows(batch, kv_head, keys, a.head_dim).from(first_key));
  copy_async<Tile::threads>(v_tile, a.v.rows(batch, kv_head, keys, a.head_dim).from(first_key));
  // Nobody sees the keys beyond the last.
  seen.fill(Tile::keys, [&](int row) {
    return first_key + row <= last_key ? a.mask.queries_of(first_key + row) : Range{queries, queries};
  });
  cta_sync();
  const int first_query = seen[0].begin, end_query = seen[last_key - first_key].end;
  const int first_tile = first_query / Tile::queries;
  const int tiles = end_query > first_query ? (end_query + Tile::queries - 1) / Tile::queries - first_tile : 0;

  // Tiles of queries pass by of one head after the other, the last queries first: so, in order, a tile of
  // queries is begun by the block that may add to it first.
  const int last_tile = first_tile + tiles - 1;
  const int end_head = tiles > 0 ? (part + 1) * heads : part * heads;  // nothing where nobody sees the keys
  struct Step { int head, tile; };
  const auto after = [&](Step step) {
    return step.tile > first_tile ? Step{step.head, step.tile - 1} : Step{step.head + 1, last_tile};
  };
  int stage = 0;  // of the step that is worked on
  const auto fetch = [&](Step step, int stage) {
    const int head = step.head, query = step.tile * Tile::queries;
    copy_async<Tile::threads>(memory.q(stage), a.q.rows(batch, head, queries, a.head_dim).from(query));
    copy_async<Tile::threads>(memory.dout(stage), a.dout.rows(batch, head, queries, a.head_dim).from(query));
    // Four at a time, by the first threads. Padded: there are values for all of the tile.
    constexpr int fours = Tile::queries / 4;
    static_assert(2 * fours <= Tile::threads);
    if (thread_id() < 2 * fours) {
      const int64_t row = a.row_of(batch, head) + query + thread_id() % fours * 4;
      cp_async16(memory.lse2(stage) + thread_id() * 16, (thread_id() < fours ? a.lse2 : a.delta) + row);
    }
    cp_async_commit();
  };

  // Of this warp: its keys in the tile, and its columns of dK and dV.
  const int warp_row = warp_id() / Tile::depth_parts * warp_rows;
  const int warp_column = warp_id() % Tile::depth_parts * Tile::columns;
  float dk[row_tiles][column_tiles][4] = {}, dv[row_tiles][column_tiles][4] = {};

  Step step{part * heads, last_tile};
  if (step.head < end_head) fetch(step, 0);
  UNROLL_BY(1)
  for (; step.head < end_head; step = after(step)) {
    cp_async_wait<0>();
    cta_sync();  // everybody's copies are there, and nobody reads the tiles of the step before any more
    const Step next = after(step);
    const bool further = next.head < end_head;
    if (Tile::stages == 2 && further) fetch(next, stage ^ 1);
    const int head = step.head, query = step.tile * Tile::queries;

    UNROLL_BY(1)
    for (int pass = 0; pass < Tile::queries; pass += Tile::pass) {
      // Of a lane's fragments: rows are keys, lane / 4 and 8 more; columns queries, 2 (lane % 4) and the next.
      const int row = warp_row + lane / 4, column = pass + 2 * (lane % 4);
      // This lane's place in dS: a chunk of eight queries is an exclusive or away.
      using STile = typename BackwardMemory<Tile>::STile;
      static_assert(Tile::queries / 8 == STile::chunks);
      const LaneCursor<STile> ds_at(ds_tile, warp_row, 0, lane / 4, 0);
      const uint32_t ds_lane = (ds_at.lane | lane % 4 * 4) ^ pass * 2;
      const auto keep_ds = [&](int r, int c, int half, uint32_t pair) {
        if (warp_column == 0)
          store_shared<uint32_t>(ds_at.base + (16 * r + 8 * half) * STile::line + (ds_lane ^ c * 16), pair);
      };
      const Range first_seen = seen[warp_row], last_seen = seen[warp_row + warp_rows - 1];
      const int first = query + pass, end = first + Tile::pass;
      if (first >= last_seen.end || end <= first_seen.begin) {
        UNROLL for (int r = 0; r < row_tiles; ++r)
          UNROLL for (int c = 0; c < pass_tiles; ++c)
            UNROLL for (int half = 0; half < 2; ++half) keep_ds(r, c, half, 0);
        continue;
      }
      const bool whole = first >= last_seen.begin && end <= first_seen.end;

      // S^T = K Q^T and dP^T = V dO^T
      float p[row_tiles][pass_tiles][4] = {}, ds[row_tiles][pass_tiles][4] = {};
      multiply<T>(p, left(k_tile, warp_row), right(memory.q(stage), pass));
      multiply<T>(ds, left(v_tile, warp_row), right(memory.dout(stage), pass));

      // P^T, and dS^T = P^T (dP^T - delta)
      const Score score(a.scores, head);
      const float ahead = static_cast<float>(query + column + a.mask.diagonal() - first_key - row);
      UNROLL for (int c = 0; c < pass_tiles; ++c) {
        const Pair lse2 = load_shared<Pair>(memory.lse2(stage) + (column + 8 * c) * 4);
        const Pair delta = load_shared<Pair>(memory.delta(stage) + (column + 8 * c) * 4);
        UNROLL for (int r = 0; r < row_tiles; ++r)
          UNROLL for (int e = 0; e < 4; ++e) {
            float slope = 1.0f;
            float& value = p[r][c][e];
            const float shift = e % 2 ? lse2.y : lse2.x;
            if constexpr (Score::plain) {
              value = exp2_approx(value * score.factor - shift);
            } else {
              const float more = static_cast<float>(8 * c + e % 2 - 16 * r - e / 2 * 8);
              value = exp2_approx(score(value, ahead + more, slope) - shift);
            }
            ds[r][c][e] = (ds[r][c][e] - (e % 2 ? delta.y : delta.x)) * slope;
          }
      }
      if (!whole) {
        UNROLL for (int r = 0; r < row_tiles; ++r)
          UNROLL for (int half = 0; half < 2; ++half) {
            const Range range = seen[row + 16 * r + 8 * half];
            UNROLL for (int c = 0; c < pass_tiles; ++c)
              UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e)
                if (!range.has(query + column + 8 * c + e % 2)) p[r][c][e] = 0.0f;
          }
      }

      // dV += P^T dO and dK += dS^T Q, 16 queries at a time
      const auto do_at = right_turned(memory.dout(stage), pass, warp_column);
      const auto q_at = right_turned(memory.q(stage), pass, warp_column);
      UNROLL for (int c = 0; c < pass_tiles; c += 2) {
        uint32_t p_left[row_tiles][4], ds_left[row_tiles][4];
        UNROLL for (int r = 0; r < row_tiles; ++r)
          UNROLL for (int side = 0; side < 2; ++side) {
            const float(&p_)[4] = p[r][c + side];
            const float(&d)[4] = ds[r][c + side];
            pack_fragment<T>(p_left[r], side, p_[0], p_[1], p_[2], p_[3]);
            pack_fragment<T>(ds_left[r], side, p_[0] * d[0], p_[1] * d[1], p_[2] * d[2], p_[3] * d[3]);
            UNROLL for (int half = 0; half < 2; ++half) keep_ds(r, c + side, half, ds_left[r][2 * side + half]);
          }
        multiply_rows<T>(dv, p_left, do_at, 8 * c);
        multiply_rows<T>(dk, ds_left, q_at, 8 * c);
      }
    }
    cta_sync();  // dS of all warps is there, and nobody reads the queries and dO any more
    if (Tile::stages == 1 && further) fetch(next, 0);

    add_dq<T>(a, memory, batch, head, query, work.tile);
    if (Tile::stages == 2) stage ^= 1;
  }

  if (tiles == 0) {  // the keys and values, which nobody has waited for
    cp_async_commit();
    cp_async_wait<0>();
  }
  cta_sync();
  // Through the tiles of keys and values, so that each store is 16 bytes of one row.
  UNROLL for (int r = 0; r < row_tiles; ++r)
    UNROLL for (int d = 0; d < column_tiles; ++d)
      UNROLL for (int e = 0; e < 4; ++e) dk[r][d][e] *= a.scores.scale;
  store_fragments<T>(k_tile, dk, warp_row, warp_column);
  store_fragments<T>(v_tile, dv, warp_row, warp_column);
  cta_sync();
  const auto write = [&](const auto& tile, const HeadsOf<T>& to) {
    write_rows<Tile::threads, Tile::keys>(tile, 0, to.head(batch, part) + first_key * to.strides.row, to.strides.row,
                                          last_key - first_key + 1, a.head_dim, thread_id());
  };
  write(k_tile, a.dk);
  write(v_tile, a.dv);
}

template <int head_dim>
int attention_backward_sm80(const AttentionInputs& inputs, const AttentionGradients& gradients,
                            const AttentionScratch& scratch, const BackwardPlan& plan, const Card& card, void* stream) {
  const AttentionShape& shape = inputs.shape;
  return with_backward_tile<head_dim>(card.shared_bytes_per_block, [&](auto tile) {
    return with_types<head_dim>(inputs, [&](auto type, auto* score) {
      using Tile = decltype(tile);
      using T = decltype(type);
      using Score = std::remove_pointer_t<decltype(score)>;
      BackwardArgs<T> args{};
      args.q = heads_of<T>(inputs.q), args.k = heads_of<T>(inputs.k), args.v = heads_of<T>(inputs.v);
      args.dout = heads_of<T>(gradients.dout);
      args.dk = heads_of<T>(gradients.dk), args.dv = heads_of<T>(gradients.dv);
      args.lse2 = Global<const float>(scratch.lse2), args.delta = Global<const float>(scratch.delta);
      args.dq = Global<float>(scratch.dq);
      args.dq_order = plan.dq_order;
      args.padded_rows = plan.padded_rows;
      args.turns = Global<int32_t>(gradients.deterministic ? scratch.turns : nullptr);
      args.mask = make_mask(shape, inputs.options);
      args.scores = make_scores(inputs.options);
      // What passes by every tile of keys: queries, dO and, in float32, dQ.
      const int all_parts = shape.batch * shape.kv_heads * plan.key_parts;
      const int64_t bytes = int64_t{8} * (shape.batch * shape.heads / all_parts) * shape.queries * shape.head_dim;
      args.schedule = make_schedule(shape.keys, Tile::keys, all_parts, 1, bytes);
      args.heads = shape.heads, args.kv_heads = shape.kv_heads, args.key_parts = plan.key_parts;
      args.head_dim = shape.head_dim;
      const LaunchShape launch_shape{{args.schedule.blocks()}, Tile::threads, Tile::shared_bytes};
      return launch<attention_backward_kernel<T, Tile, Score>>(launch_shape, stream, args);
    });
  });
}

}  // namespace almostgpt
