// What Hopper's forward works on: the arguments, the tiles of queries that a block takes, and a lane's rows in one.
#pragma once

#include "attention/heads.cuh"

namespace almostgpt {

struct HopperForwardArgs {
  TensorMap q, k, v, out;
  Global<float> lse;  // (batch, heads, queries)
  Mask mask;
  ScoreArgs scores;
  Global<const float> sink_logits;
  Schedule schedule;  // of packs of heads
  int heads, packs, sharing;  // packs: of a batch entry; sharing: those of one key head
  int pack_bits;  // log2 of the heads in a pack. Row r of a pack is token r >> pack_bits

  DEVICE int rows() const { return mask.queries << pack_bits; }
  DEVICE int token(int row) const { return min(row, rows() - 1) >> pack_bits; }  // beyond the last: the last
  DEVICE Range keys_of(int row) const { return mask.keys_of(token(row)); }
  // From the first that the first row sees to the last that the last row does, in tiles.
  DEVICE Range tiles_of(int first_row, int last_row, int tile_keys) const {
    const int begin = keys_of(first_row).begin, end = keys_of(last_row).end;
    return end > begin ? Range{begin / tile_keys, (end + tile_keys - 1) / tile_keys} : Range{0, 0};
  }
};

// What a block works on, one after another. Block b has the b-th of each round, from the left and from the
// right in turn: the works of a round are ordered by length, and so nobody has the longer end of each.
struct HopperWork {
  int batch, pack, kv_head, first_row;
  bool there;

  DEVICE HopperWork(const HopperForwardArgs& a, int round, int tile_rows) {
    const int place = round % 2 == 0 ? block_x() : grid_x() - 1 - block_x();
    const int64_t index = int64_t{round} * grid_x() + place;
    there = index < a.schedule.blocks();
    const Schedule::Work work = a.schedule.work(there ? static_cast<int>(index) : 0);
    batch = work.head / a.packs, pack = work.head % a.packs, kv_head = pack / a.sharing;
    first_row = (a.schedule.tiles - 1 - work.tile) * tile_rows;  // the last see the most
  }
};

// A lane's two rows of 16, 8 apart: whose they are, what they see, and what becomes of their products.
template <class Score>
struct HopperRows {
  const HopperForwardArgs& a;
  int first;          // of the pack's rows; the other is first + 8
  int first_head;     // of the pack
  Range seen[2];
  Range all_see;      // all rows of the warp
  Score score[2];     // by their heads

  DEVICE HopperRows(const HopperForwardArgs& a, const HopperWork& work, int first)
      : a(a), first(first), first_head(work.pack << a.pack_bits), seen{a.keys_of(first), a.keys_of(first + 8)},
        all_see{shfl_idx(seen[1].begin, 31), shfl_idx(seen[0].end, 0)},
        score{Score(a.scores, head(0)), Score(a.scores, head(1))} {}

  DEVICE int row(int half) const { return first + 8 * half; }
  DEVICE int token(int half) const { return a.token(row(half)); }
  DEVICE int head(int half) const { return first_head + (row(half) & ((1 << a.pack_bits) - 1)); }
  DEVICE float factor() const { return score[0].factor; }

  // From the products of a tile of keys, of which `first_key` is the first, to scores: bent and masked.
  template <int tiles> DEVICE void finish(float (&scores)[1][tiles][4], int first_key) const {
    const int column = first_key + lane_id() % 4 * 2;  // this lane's first
    // f(score, its half of the rows, how far its column is from the first)
    const auto for_each = [&](auto f) {
      UNROLL for (int c = 0; c < tiles; ++c)
        UNROLL for (int i = 0; i < 4; ++i) f(scores[0][c][i], i / 2, 8 * c + i % 2);
    };
    if constexpr (!Score::plain) {
      // Each question is asked once, and not of every score: so many branches would cost more than the answers.
      const float scale = score[0].scale, cap = score[0].cap;
      if (cap > 0.0f) for_each([&](float& x, int, int) { x = cap * Score::bend(x * scale); });
      else for_each([&](float& x, int, int) { x *= scale; });
      if (a.scores.alibi_slopes) {
        const int here = a.mask.diagonal() - column;
        const float ahead[2] = {static_cast<float>(token(0) + here), static_cast<float>(token(1) + here)};
        for_each([&](float& x, int half, int at) { x -= score[half].penalty(ahead[half] - static_cast<float>(at)); });
      }
    }
    // Tiles on the right may end too late, those on the left begin too early; between them nothing is masked.
    if (first_key + 8 * tiles > all_see.end) {
      const int end[2] = {seen[0].end - column, seen[1].end - column};
      for_each([&](float& x, int half, int at) { x = at < end[half] ? x : kMinusInfinity; });
    }
    if (first_key < all_see.begin) {
      const int begin[2] = {seen[0].begin - column, seen[1].begin - column};
      for_each([&](float& x, int half, int at) { x = at >= begin[half] ? x : kMinusInfinity; });
    }
  }
};

}  // namespace almostgpt
