// Tiles of 16-bit elements in shared memory: how they come there, and how the tensor cores read them.
#pragma once

#include "device/device.cuh"

namespace almostgpt {

using namespace device;

// rows x columns in panels of 64 columns (or 32, where there are no more): a row of a panel is one line
// of 128 bytes, whose chunks of 16 bytes are swizzled, so that eight rows of one column of chunks lie in
// different banks.
//
//   row 0    c0 c1 c2 c3 c4 c5 c6 c7        chunk c of row r lies at c ^ (r mod 8)
//   row 1    c1 c0 c3 c2 c5 c4 c7 c6
//   row 2    c2 c3 c0 c1 c6 c7 c4 c5   …
template <int rows_, int columns_>
struct SharedTile {
  static constexpr int rows = rows_, columns = columns_;
  static constexpr int line = columns < 64 ? 64 : 128;  // bytes
  static constexpr int chunks = line / 16;              // of a line
  static constexpr SwizzleSpan span = line == 64 ? SwizzleSpan::bytes64 : SwizzleSpan::bytes128;
  static constexpr uint32_t bytes = rows * columns * 2;
  static_assert(columns * 2 % line == 0);

  shared_addr base;  // a multiple of 1024

  DEVICE shared_addr at(int row, int chunk) const {
    return base + swizzled(chunk / chunks * (rows * line) + row * line + chunk % chunks * 16, span);
  }
};

// A lane's place in a tile, from which constant steps lead on: rows by eights, which leave the swizzle
// as it is, and chunks by twos, which turn into an exclusive or. `base` is the same in a whole warp, and
// `lane` for all tiles alike: so a few registers serve all tiles.
template <class Tile>
struct LaneCursor {
  shared_addr base;
  uint32_t lane;

  // From a row that is a multiple of 8 and a column that begins a panel, on to the lane's row, below 16,
  // and chunk, 0 or 1.
  DEVICE LaneCursor(const Tile& tile, int row, int column, int lane_row, int lane_chunk)
      : base(tile.base + column / (8 * Tile::chunks) * (Tile::rows * Tile::line) + row * Tile::line),
        lane(swizzled(lane_row * Tile::line + lane_chunk * 16, Tile::span)) {}

  DEVICE shared_addr at(int rows, int chunks) const {
    const int panel = chunks / Tile::chunks;
    return base + (panel * (Tile::rows * Tile::line) + rows * Tile::line) + (lane ^ chunks % Tile::chunks * 16);
  }
};

// The four 8x8 matrices that ldmatrix brings, for the operands of mma_m16n8k16 (lane l gives a row of
// matrix l / 8). Rows and columns are those of the tile in memory.
//
//   left         a[4] of 16 rows x 16 columns                           A = tile
//   left_turned  a[4] of 16 columns x 16 rows, with ldmatrix_x4_trans   A = tile transposed
//   right        b[0..1] and b[2..3]: 8 rows each x 16 columns          B = tile transposed
//   right_turned b[0..1] and b[2..3]: 16 rows x 8 columns each, trans   B = tile
template <class Tile> DEVICE LaneCursor<Tile> left(const Tile& tile, int row = 0) {
  return {tile, row, 0, lane_id() % 16, lane_id() / 16};
}
template <class Tile> DEVICE LaneCursor<Tile> left_turned(const Tile& tile) {
  return {tile, 0, 0, lane_id() / 16 * 8 + lane_id() % 8, lane_id() / 8 % 2};
}
template <class Tile> DEVICE LaneCursor<Tile> right(const Tile& tile, int row = 0) {
  return {tile, row, 0, lane_id() / 16 * 8 + lane_id() % 8, lane_id() / 8 % 2};
}
template <class Tile> DEVICE LaneCursor<Tile> right_turned(const Tile& tile, int row = 0, int column = 0) {
  return {tile, row, column, lane_id() % 16, lane_id() / 16};
}

// Rows of a matrix in global memory, of which `rows` and `columns` (a multiple of 8) are there: what is
// beyond them becomes zeros.
template <class T>
struct Rows {
  Global<const T> data;
  int stride;  // below kMaxRowStride: what a tile's rows are apart takes one register, not two
  int rows, columns;

  DEVICE Rows from(int first) const { return {data + int64_t{first} * stride, stride, rows - first, columns}; }
};

// By all `threads` threads of the block, with cp.async: not there before a commit, a wait and a barrier.
template <int threads, class Tile, class T>
DEVICE void copy_async(const Tile& tile, const Rows<T>& from) {
  constexpr int row_chunks = Tile::columns / 8, step = threads / row_chunks;
  static_assert(threads % row_chunks == 0 && Tile::rows % step == 0);
  const int row = thread_id() / row_chunks, chunk = thread_id() % row_chunks;
  const bool column_there = chunk * 8 < from.columns;
  const shared_addr start = tile.at(row, chunk);
  int offset = row * from.stride + chunk * 8;
  UNROLL for (int i = 0; i < Tile::rows / step; ++i) {
    // Eight rows on, the swizzle is the same.
    const shared_addr to = step % 8 == 0 ? start + i * (step * Tile::line) : tile.at(row + i * step, chunk);
    cp_async16(to, from.data + offset, column_there && row + i * step < from.rows);
    offset += step * from.stride;
  }
}

}  // namespace almostgpt
