// Products of tiles in shared memory, and what becomes of their fragments.
#pragma once

#include "attention/shared_tile.cuh"

namespace almostgpt {

// sums[r][c] += A B^T for 16 columns of both: `left` holds A's, of rows 16 r on; `b`, a cursor of right,
// stands at B's row 0, and `chunk` says where the columns begin.
template <class T, int row_tiles, int column_tiles, class Tile>
DEVICE void multiply_columns(float (&sums)[row_tiles][column_tiles][4], const uint32_t (&left)[row_tiles][4],
                             const LaneCursor<Tile>& b, int chunk) {
  UNROLL for (int c = 0; c < column_tiles; c += 2) {
    uint32_t right[4];
    ldmatrix_x4(right, b.at(8 * c, chunk));
    UNROLL for (int r = 0; r < row_tiles; ++r) {
      mma_m16n8k16<T>(sums[r][c], left[r], right[0], right[1]);
      mma_m16n8k16<T>(sums[r][c + 1], left[r], right[2], right[3]);
    }
  }
}

// The same over all columns of the tiles, A's read from memory, too: `a` is a cursor of left.
template <class T, int row_tiles, int column_tiles, class TileA, class TileB>
DEVICE void multiply(float (&sums)[row_tiles][column_tiles][4], const LaneCursor<TileA>& a,
                     const LaneCursor<TileB>& b) {
  static_assert(TileA::columns == TileB::columns && column_tiles % 2 == 0);
  UNROLL_BY(1)  // unrolled over all panels, the backward kernels spill registers
  for (int panel = 0; panel < TileA::columns / (8 * TileA::chunks); ++panel) {
    LaneCursor<TileA> a_panel = a;
    LaneCursor<TileB> b_panel = b;
    a_panel.base += panel * (TileA::rows * TileA::line), b_panel.base += panel * (TileB::rows * TileB::line);
    UNROLL for (int chunk = 0; chunk < TileA::chunks; chunk += 2) {
      uint32_t left[row_tiles][4];
      UNROLL for (int r = 0; r < row_tiles; ++r) ldmatrix_x4(left[r], a_panel.at(16 * r, chunk));
      multiply_columns<T>(sums, left, b_panel, chunk);
    }
  }
}

// sums[r][d] += A B for 16 rows of B, from its row `row` on, and the columns from chunk `chunk` on; `b` is
// a cursor of right_turned.
template <class T, int row_tiles, int column_tiles, class Tile>
DEVICE void multiply_rows(float (&sums)[row_tiles][column_tiles][4], const uint32_t (&a)[row_tiles][4],
                          const LaneCursor<Tile>& b, int row, int chunk = 0) {
  UNROLL for (int d = 0; d < column_tiles; d += 2) {
    uint32_t right[4];
    ldmatrix_x4_trans(right, b.at(row, chunk + d));
    UNROLL for (int r = 0; r < row_tiles; ++r) {
      mma_m16n8k16<T>(sums[r][d], a[r], right[0], right[1]);
      mma_m16n8k16<T>(sums[r][d + 1], a[r], right[2], right[3]);
    }
  }
}

// Half of a left operand's fragment from a fragment of sums: rows lane / 4, and lane / 4 + 8.
template <class T> DEVICE void pack_fragment(uint32_t (&left)[4], int part, float a, float b, float c, float d) {
  left[2 * part] = pair_of(T(), a, b);
  left[2 * part + 1] = pair_of(T(), c, d);
}

// A warp's sums, rounded to T, into a tile; the warp_sync or barrier before they are read is the caller's.
template <class T, int row_tiles, int column_tiles, class Tile>
DEVICE void store_fragments(const Tile& tile, const float (&sums)[row_tiles][column_tiles][4], int row, int column) {
  const LaneCursor<Tile> to(tile, row, column, lane_id() / 4, 0);
  const uint32_t pair = lane_id() % 4 * 4;
  UNROLL for (int r = 0; r < row_tiles; ++r)
    UNROLL for (int half = 0; half < 2; ++half)
      UNROLL for (int d = 0; d < column_tiles; ++d)
        store_shared<uint32_t>(to.at(16 * r + 8 * half, d) + pair,
                               pair_of(T(), sums[r][d][2 * half], sums[r][d][2 * half + 1]));
}

// Rows `first` to `first` + `count` of a tile to global memory in 16-byte stores, by `threads` threads, of
// which this is `thread`; `to` is the tile's row 0, of which `rows` and `columns` are there.
template <int threads, int count, class Tile, class T>
DEVICE void write_rows(const Tile& tile, int first, Global<T> to, int64_t stride, int rows, int columns, int thread) {
  constexpr int chunks = Tile::columns / 8;
  static_assert(count * chunks % threads == 0);
  UNROLL for (int i = 0; i < count * chunks / threads; ++i) {
    const int at = thread + i * threads, row = first + at / chunks, chunk = at % chunks;
    if (row < rows && chunk * 8 < columns)
      store_global_as<u32x4>(to + (row * stride + chunk * 8), load_shared<u32x4>(tile.at(row, chunk)));
  }
}

}  // namespace almostgpt
