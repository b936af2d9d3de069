// How the weight of int8_linear is cut: a block takes 8, 16 or 32 of its rows, and its warps share their
// columns. Plain C++.
//
// A multiprocessor of an H200 has to have about 25 KiB under way to keep the memory busy (4.8 TB/s x 0.7 us
// / 132). A lane asks for all vectors of a round, 16 bytes each, before it uses the first: of the weight 4 or
// 8 of them, which makes 2 or 4 KiB a warp. With 128 registers a thread 16 warps are resident: 32 or 64 KiB.
#pragma once

#include <cstdint>

namespace almostgpt {

constexpr int kGroupRows = 8;     // of the weight: half of an instruction's 16
constexpr int kStepColumns = 64;  // of a warp: 4 lanes beside each other have 16 each

// A block's part: `groups` of 8 rows of the weight, with up to 8 `x_tiles` rows of x.
template <int groups_, int x_tiles_>
struct Int8LinearTile {
  static constexpr int groups = groups_, x_tiles = x_tiles_;
  static constexpr int rows = groups * kGroupRows, x_rows = 8 * x_tiles;
  // Of a round. A step's vectors are `groups` of the weight and 2 of each 8 rows of x; with 24 of them in
  // registers (two groups and tiles, four steps) the kernel spilled on sm_80 and sm_90a.
  static constexpr int steps = groups + 2 * x_tiles < 6 ? 4 : 2;
  // A small block shares its multiprocessor with few others, or none.
  static constexpr int most_warps = groups == 1 ? 16 : 8;
  static constexpr int blocks = 16 / most_warps;  // on a multiprocessor, at least

  static constexpr uint32_t sum_bytes = rows * x_rows * 4;  // of a warp
  static constexpr uint32_t shared_bytes(int warps) { return warps * sum_bytes + rows * 8; }
};

struct WarpShare {
  int warps;
  int columns;  // of each warp, a multiple of a step's; the last one may have fewer
};

// As many warps as take all columns in one round, if there may be so many.
template <class Tile>
constexpr WarpShare share_columns(int columns) {
  const int steps = (columns + kStepColumns - 1) / kStepColumns;
  const int wanted = (steps + Tile::steps - 1) / Tile::steps;
  const int warps = wanted < Tile::most_warps ? wanted : Tile::most_warps;
  const int share = (steps + warps - 1) / warps;
  return {(steps + share - 1) / share, share * kStepColumns};
}

// What the busiest multiprocessor has to read for each column, in half bytes: its blocks' rows of the weight,
// and for each of its blocks all rows of x. These are of 16 bits, and count a quarter of that: L1, several times
// as fast as what is behind it, has them from the first block on, since the weight leaves nothing there.
constexpr int64_t busiest_reads(int groups, int64_t outputs, int x_rows, int multiprocessors) {
  const int64_t rows = groups * kGroupRows, blocks = (outputs + rows - 1) / rows;
  return (blocks + multiprocessors - 1) / multiprocessors * (2 * rows + x_rows);
}

// Groups of a block: large blocks read x seldom, small ones spread evenly over the card.
constexpr int choose_groups(int64_t outputs, int x_rows, int multiprocessors) {
  int best = 1;
  for (int groups = 2; groups <= 4; groups *= 2)
    if (busiest_reads(groups, outputs, x_rows, multiprocessors) <
        busiest_reads(best, outputs, x_rows, multiprocessors))
      best = groups;
  return best;
}

// An H200 and one row of x: 768 outputs would be 48 blocks of 16, and are 96 of 8; the 50257 of the
// vocabulary are 1571 blocks of 32. Of 3072 columns 12 warps have 256 each.
static_assert(choose_groups(768, 1, 132) == 1 && choose_groups(50257, 1, 132) == 4);
static_assert(choose_groups(4800, 8, 132) == 1 && choose_groups(4800, 16, 132) == 2);
static_assert(share_columns<Int8LinearTile<1, 1>>(3072).warps == 12);
static_assert(share_columns<Int8LinearTile<1, 1>>(3072).columns == 256);
static_assert(share_columns<Int8LinearTile<2, 1>>(6400).warps == 8);

}  // namespace almostgpt
