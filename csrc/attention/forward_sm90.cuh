// FlashAttention forward for Hopper: TMA, wgmma, and warpgroups that specialise (Shah et al., "FlashAttention-3",
// arXiv:2407.08608).
//
// One thread, the producer, asks TMA for tiles of queries, keys and values. Two or three warpgroups, the
// consumers, have 64 rows of queries each. In a step a consumer starts two products, the scores of this tile
// of keys and the output of the tile before, and while they run computes the softmax of the scores as soon as
// they are there. The consumers take turns to start theirs, so that the tensor cores multiply for one while
// another computes exponentials. Blocks stay, as many as there are multiprocessors, and go from one tile of
// queries to the next: the queries and the first keys of the next come while this one ends.
// docs/attention.md walks through.
#pragma once

#include "attention/forward.cuh"
#include "attention/fragments.cuh"
#include "attention/pipeline_sm90.cuh"
#include "attention/softmax.cuh"
#include "attention/warpgroup_sm90.cuh"
#include "attention/works_sm90.cuh"

namespace almostgpt {

template <class Tile>
struct HopperForwardShared {
  Ring<1, Tile::query_bytes> queries;
  Ring<Tile::stages, Tile::key_bytes> keys, values;
  shared_addr out;    // a tile like the queries', or their own
  shared_addr tiles;  // a Range: which tiles of keys come for the queries that are there
  // As tiles.h, which knows no rings, has counted.
  static_assert(Tile::barrier_bytes >=
                decltype(queries)::barrier_bytes + 2 * decltype(keys)::barrier_bytes + sizeof(Range));

  DEVICE HopperForwardShared() {
    shared_addr next = shared_base();
    const auto take = [&](uint32_t bytes) { return next += bytes, next - bytes; };
    queries.tiles = take(queries.all_bytes);
    keys.tiles = take(keys.all_bytes);
    values.tiles = take(values.all_bytes);
    out = Tile::out_apart ? take(Tile::query_bytes) : queries.tiles;
    queries.barriers = take(queries.barrier_bytes);
    keys.barriers = take(keys.barrier_bytes);
    values.barriers = take(values.barrier_bytes);
    tiles = take(sizeof(Range));
  }
};

// One thread. Tiles come in the order in which they are used: the scores are a tile ahead of the output.
template <class Tile>
DEVICE void produce(const HopperForwardArgs& a, const HopperForwardShared<Tile>& shared) {
  constexpr int panels = Tile::head_dim / 64;
  uint32_t use = 0;
  for (int round = 0;; ++round) {
    const HopperWork work(a, round, Tile::queries);
    if (!work.there) return;
    const Range tiles = a.tiles_of(work.first_row, work.first_row + Tile::queries - 1, Tile::keys);

    const auto fetch = [&](const auto& ring, const TensorMap& map, uint32_t its_use, int tile) {
      const auto place = ring.at(its_use);
      place.wait_until_empty();
      place.expect_bytes();
      UNROLL for (int panel = 0; panel < panels; ++panel)
        tma_load(place.tile + panel * (Tile::keys * 128), &map, place.full, 64 * panel, tile * Tile::keys,
                 work.kv_head, work.batch);
    };
    const auto fetch_queries = [&] {
      const auto place = shared.queries.at(round);
      place.wait_until_empty();
      store_shared(shared.tiles, tiles);  // who waits for the queries sees this, too
      if (tiles.begin == tiles.end) return mbar_arrive(place.full);
      place.expect_bytes();
      UNROLL for (int group = 0; group < Tile::consumers; ++group)
        UNROLL for (int panel = 0; panel < panels; ++panel)
          tma_load(place.tile + (group * panels + panel) * (64 * 128), &a.q, place.full, 64 * panel, 0,
                   (work.first_row + 64 * group) >> a.pack_bits, work.pack, work.batch);
    };

    // From the right: the tiles that a causal mask cuts come first.
    for (int tile = tiles.end - 1; tile >= tiles.begin; --tile, ++use) {
      fetch(shared.keys, a.k, use, tile);
      if (tile == tiles.end - 1) fetch_queries();  // their place may be in use for longer than that of keys
      else fetch(shared.values, a.v, use - 1, tile + 1);
    }
    if (tiles.begin == tiles.end) fetch_queries();
    else fetch(shared.values, a.v, use - 1, tiles.begin);
  }
}

// Which of the consumers this warp belongs to; -1: it is the producer's. The same in all lanes, by a way that
// tells the compiler so.
DEVICE int consumer_group() { return shfl_idx(warp_id() / 4, 0) - 1; }

// What is left when a warpgroup has seen its last tile. Out goes through shared memory, from where TMA writes whole
// rows; those beyond the last it leaves out.
template <class T, class Tile, class Score>
DEVICE void finish_one(const HopperForwardArgs& a, const HopperForwardShared<Tile>& shared, const HopperWork& work,
                       int round, int group_row, const HopperRows<Score>& rows, const OnlineSoftmax<1>& softmax,
                       float (&out)[1][Tile::head_dim / 8][4]) {
  using OutTile = SharedTile<Tile::group_rows, Tile::head_dim>;
  const int group = consumer_group(), lane = lane_id(), thread = thread_id() % 128, warp = thread / 32;
  const OutTile out_tile{shared.out + group * OutTile::bytes};
  UNROLL for (int half = 0; half < 2; ++half) {
    const int head = rows.head(half);
    const float sink = a.sink_logits ? load_global<Cache::read_only>(a.sink_logits + head) * kLog2E : kMinusInfinity;
    const auto finished = softmax.finish(0, half, rows.factor(), sink);
    if (lane % 4 == 0 && rows.row(half) < a.rows())
      store_global(a.lse + ((int64_t{work.batch} * a.heads + head) * a.mask.queries + rows.token(half)), finished.lse);
    UNROLL for (int d = 0; d < Tile::head_dim / 8; ++d)
      UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e) out[0][d][e] *= finished.weight;
  }
  const int barrier = kGroupBarrier + group;
  if constexpr (Tile::out_apart) {
    if (thread == 0) tma_wait_read<0>();  // what was there before
  }
  bar_sync(barrier, 128);  // nobody reads this place any more: neither TMA, nor products, where it is the queries'
  store_fragments<T>(out_tile, out, 16 * warp, 0);
  fence_proxy_async();  // what this thread wrote, TMA shall read,
  bar_sync(barrier, 128);  // once the others have written, too
  if (thread == 0) {
    if (group_row < a.rows()) {
      UNROLL for (int panel = 0; panel < Tile::head_dim / 64; ++panel)
        tma_store(&a.out, out_tile.base + panel * (64 * 128), 64 * panel, 0, group_row >> a.pack_bits, work.pack,
                  work.batch);
      tma_commit();
    }
    if constexpr (!Tile::out_apart) {
      tma_wait_read<0>();
      shared.queries.at(round).release();
    }
  }
}

// One tile of queries, by one warpgroup with its 64 rows. `use` counts the uses of the rings of keys and values.
template <class T, class Tile, class Score>
DEVICE void consume_one(const HopperForwardArgs& a, const HopperForwardShared<Tile>& shared, const HopperWork& work,
                        int round, uint32_t& use) {
  using QTile = SharedTile<Tile::group_rows, Tile::head_dim>;
  using KTile = SharedTile<Tile::keys, Tile::head_dim>;
  const int group = consumer_group();  // asked anew: kept from work to work it would take a register too many
  const int lane = lane_id(), warp = thread_id() % 128 / 32;
  const QTile q_tile{shared.queries.tiles + group * QTile::bytes};
  const Turns<Tile::consumers> turns{group};
  const auto take_turn = [&] { if constexpr (Tile::take_turns) turns.take(); };
  const auto pass_turn = [&] { if constexpr (Tile::take_turns) turns.pass(); };

  const int group_row = work.first_row + 64 * group;
  const HopperRows<Score> rows(a, work, group_row + 16 * warp + lane / 4);
  Range own = a.tiles_of(group_row, group_row + 63, Tile::keys);
  if (group_row >= a.rows()) own = {0, 0};

  const auto queries = shared.queries.at(round);
  queries.wait_until_full();
  Range tiles{};
  if (lane == 0) tiles = load_shared<Range>(shared.tiles);  // the lane that releases the queries
  tiles = {shfl_idx(tiles.begin, 0), shfl_idx(tiles.end, 0)};

  float scores[1][Tile::keys / 8][4], out[1][Tile::head_dim / 8][4] = {};
  uint32_t p[Tile::keys / 16][4];  // the exponentials, rounded: a left operand
  OnlineSoftmax<1> softmax;
  bool moved = false;
  float shrink[2];

  // The exponentials of scores; out, whose sums may be under way, is to be multiplied by `shrink` where `moved`.
  const auto exponentiate = [&](int tile) {
    rows.finish(scores, tile * Tile::keys);
    moved = false, shrink[0] = shrink[1] = 1.0f;
    softmax.exponentiate(scores, rows.factor(), [&](int, int half, float by) { moved = true, shrink[half] = by; });
  };
  const auto move_out = [&] {
    UNROLL for (int d = 0; d < Tile::head_dim / 8; ++d)
      UNROLL for (int e = 0; e < 4; ++e) out[0][d][e] *= shrink[e / 2];
  };
  const auto round_scores = [&] {
    UNROLL for (int c = 0; c < Tile::keys / 8; ++c) {
      const float(&s)[4] = scores[0][c];
      pack_fragment<T>(p[c / 2], c % 2, s[0], s[1], s[2], s[3]);
    }
  };
  // Before products are issued: all that they read or add to is in its registers.
  const auto settle = [&] {
    keep_registers(flat(scores));
    keep_registers(flat(out));
    UNROLL for (int slice = 0; slice < Tile::keys / 16; ++slice) keep_registers(p[slice]);
    wgmma_fence();
  };
  // Tiles that come for other warpgroups, down to this one.
  int tile = tiles.end - 1;
  const auto let_pass = [&](int last) {
    for (; tile >= last; --tile, ++use) {
      const auto k = shared.keys.at(use), v = shared.values.at(use);
      k.wait_until_full();
      take_turn();
      pass_turn();
      k.release_together();
      v.wait_until_full();
      v.release_together();
    }
  };

  // When the products of the last scores are there, the next queries may come.
  const auto release_queries = [&] {
    if (Tile::out_apart && tile == own.begin) queries.release();
  };

  const bool works = own.begin < own.end;
  let_pass(works ? own.end : tiles.begin);
  if (works) {
    {
      const auto k = shared.keys.at(use);
      k.wait_until_full();
      take_turn();
      keep_registers(flat(scores));
      wgmma_fence();
      issue_product<T>(scores, q_tile, KTile{k.tile});
      wgmma_commit();
      pass_turn();
      wgmma_wait<0>();
      keep_registers(flat(scores));
      k.release();
      release_queries();
      exponentiate(tile);
      round_scores();
      --tile, ++use;
    }
    UNROLL_BY(1)
    for (; tile >= own.begin; --tile, ++use) {
      const auto k = shared.keys.at(use), v = shared.values.at(use - 1);
      k.wait_until_full();
      v.wait_until_full();
      take_turn();
      settle();
      issue_product<T>(scores, q_tile, KTile{k.tile});  // S = Q K^T of this tile …
      wgmma_commit();
      issue_rows_product<T>(out, p, KTile{v.tile});  // … and O += P V of the one before
      wgmma_commit();
      pass_turn();
      wgmma_wait<1>();
      keep_registers(flat(scores));
      k.release();
      release_queries();
      exponentiate(tile);
      const auto finish_output = [&] {
        wgmma_wait<0>();
        keep_registers(flat(out));
        v.release();
      };
      // Waiting in both branches, so that ptxas computes the exponentials before: over a wait it moves them,
      // over the end of a block it does not (tests/build/test_attention_model_sm90.py looks where they are).
      if (moved) {
        finish_output();
        move_out();
      } else {
        finish_output();
      }
      round_scores();  // not before: the product was reading P
    }
    const auto v = shared.values.at(use - 1);
    v.wait_until_full();
    settle();
    issue_rows_product<T>(out, p, KTile{v.tile});
    wgmma_commit();
    wgmma_wait<0>();
    keep_registers(flat(out));
    v.release();
  } else if constexpr (Tile::out_apart) {
    queries.release();
  }
  let_pass(tiles.begin);

  finish_one<T, Tile>(a, shared, work, round, group_row, rows, softmax, out);
}

template <class T, class Tile, class Score>
DEVICE void consume(const HopperForwardArgs& a, const HopperForwardShared<Tile>& shared) {
  if constexpr (Tile::take_turns) Turns<Tile::consumers>{consumer_group()}.begin();
  uint32_t use = 0;
  for (int round = 0;; ++round) {
    const HopperWork work(a, round, Tile::queries);
    if (!work.there) break;
    consume_one<T, Tile, Score>(a, shared, work, round, use);
  }
  if (thread_id() % 128 == 0) tma_wait_read<0>();  // the block's shared memory must outlive the read
  if constexpr (Tile::take_turns) Turns<Tile::consumers>{consumer_group()}.end();
}

template <class T, class Tile, class Score>
KERNEL LAUNCH_BOUNDS(Tile::threads, 1) attention_forward_sm90_kernel(GRID_CONSTANT const HopperForwardArgs a) {
  const HopperForwardShared<Tile> shared;
  if (thread_id() == 0) {
    // Keys and values are released by every warp; queries too, or by one thread of each warpgroup that has
    // put out in their place.
    shared.queries.init(Tile::out_apart ? 4 * Tile::consumers : Tile::consumers);
    shared.keys.init(4 * Tile::consumers);
    shared.values.init(4 * Tile::consumers);
    fence_mbarrier_init();
    prefetch_tensor_map(&a.q);
    prefetch_tensor_map(&a.k);
    prefetch_tensor_map(&a.v);
    prefetch_tensor_map(&a.out);
  }
  cta_sync();

  if (consumer_group() < 0) {
    setmaxnreg_dec<Tile::producer_registers>();
    if (warp_id() == 0 && elect_one()) produce<Tile>(a, shared);
  } else {
    setmaxnreg_inc<Tile::consumer_registers>();
    consume<T, Tile, Score>(a, shared);
  }
}

template <int head_dim>
int attention_forward_sm90(const AttentionInputs& inputs, Heads out, float* lse, const Card& card, void* stream) {
  const AttentionShape& shape = inputs.shape;
  const AttentionOptions& options = inputs.options;
  const int sharing = shape.heads / shape.kv_heads;
  const HopperCall call{shape.queries, shape.keys, sharing,
                        options.window_left < 0 && options.window_right < 0 && !options.cu_seqlens};
  return with_types<head_dim, true>(inputs, [&](auto type, auto* score) {
    using T = decltype(type);
    using Score = std::remove_pointer_t<decltype(score)>;
    return with_hopper_forward_tile<head_dim, Score::plain>(call, [&](auto tile) {
      using Tile = decltype(tile);
      const int pack = hopper_pack(call, Tile::queries);
      HopperForwardArgs args{};
      const auto of_keys = [&](TensorMap* map, const ConstHeads& heads) {
        return make_heads_map<T>(map, heads.data, heads.strides, shape, shape.kv_heads, shape.keys, Tile::keys);
      };
      if (make_packed_map<T>(&args.q, inputs.q.data, inputs.q.strides, shape, pack) ||
          make_packed_map<T>(&args.out, out.data, out.strides, shape, pack) || of_keys(&args.k, inputs.k) ||
          of_keys(&args.v, inputs.v))
        return kNoMap;
      args.lse = Global<float>(lse);
      args.mask = make_mask(shape, options);
      args.scores = make_scores(options);
      args.sink_logits = Global<const float>(options.sink_logits);
      args.heads = shape.heads, args.packs = shape.heads / pack, args.sharing = sharing / pack;
      while (1 << args.pack_bits < pack) ++args.pack_bits;
      const int64_t pair_bytes = int64_t{4} * shape.keys * shape.head_dim;  // of keys and values
      args.schedule = make_schedule(shape.queries * pack, Tile::queries, shape.batch * args.packs, args.sharing,
                                    pair_bytes);
      const unsigned resident = static_cast<unsigned>(card.multiprocessors);
      const unsigned blocks = args.schedule.blocks() < resident ? args.schedule.blocks() : resident;
      return launch<attention_forward_sm90_kernel<T, Tile, Score>>({{blocks}, Tile::threads, Tile::shared_bytes},
                                                                   stream, args);
    });
  });
}

}  // namespace almostgpt
