// Products with keys and values of 8 bits, which become T in registers, exactly: the tensor cores then
// multiply as ever. Products of 8 bits would need queries and probabilities of 8 bits, too, and save
// nothing: what takes time is reading.
//
// ldmatrix moves pairs of bytes. Of a row of keys a lane so gets four neighbours where it would get two
// and another two of T; so the queries lie in that order (order_like_int8). Of values it gets two
// neighbouring columns of two keys, which go into two fragments, of the even and of the odd columns.
#pragma once

#include "attention/fragments.cuh"
#include "cache/decode_merge.cuh"
#include "cache/decode_keys.cuh"

namespace almostgpt {

// Of 16 columns: 0 1 4 5 8 9 12 13, and 2 3 6 7 10 11 14 15. So what a lane has of one instruction's depth
// of 16, columns 2 t, 2 t + 1 and 2 t + 8, 2 t + 9, are columns 4 t to 4 t + 3 of the keys.
DEVICE void order_like_int8(u32x4& low, u32x4& high) {
  const u32x4 a = low, b = high;
  low = {a.x, a.z, b.x, b.z};
  high = {a.y, a.w, b.y, b.w};
}

// multiply of fragments.cuh, with B of 16 rows of int8: its tile has two of them to an element.
template <class T, int row_tiles, class TileA, class TileB>
DEVICE void multiply_int8(float (&sums)[row_tiles][2][4], const LaneCursor<TileA>& a, const LaneCursor<TileB>& b) {
  static_assert(TileA::columns == 2 * TileB::columns && TileB::rows == 16);
  UNROLL_BY(1)
  for (int panel = 0; panel < TileB::columns / (8 * TileB::chunks); ++panel) {
    LaneCursor<TileB> b_panel = b;
    b_panel.base += panel * (TileB::rows * TileB::line);
    LaneCursor<TileA> a_panel = a;  // 16 columns of int8 are one chunk, of T they are two
    a_panel.base += panel * (2 * TileB::chunks / TileA::chunks) * (TileA::rows * TileA::line);
    UNROLL for (int chunk = 0; chunk < TileB::chunks; chunk += 2) {
      uint32_t right[4];  // of keys 0 to 7: this chunk and the next; the same of keys 8 to 15
      ldmatrix_x4(right, b_panel.at(0, chunk));
      UNROLL for (int next = 0; next < 2; ++next) {
        const uint32_t b0[2] = {pair_of_int8<T, 0, 1>(right[next]), pair_of_int8<T, 0, 1>(right[2 + next])};
        const uint32_t b1[2] = {pair_of_int8<T, 2, 3>(right[next]), pair_of_int8<T, 2, 3>(right[2 + next])};
        UNROLL for (int r = 0; r < row_tiles; ++r) {
          uint32_t left[4];
          ldmatrix_x4(left, a_panel.at(16 * r, 2 * (chunk + next)));
          UNROLL for (int c = 0; c < 2; ++c) mma_m16n8k16<T>(sums[r][c], left, b0[c], b1[c]);
        }
      }
    }
  }
}

// multiply_rows, of 16 rows of int8; sums of columns 16 c, 16 c + 2 … and 16 c + 1, 16 c + 3 … lie in
// fragments 2 c and 2 c + 1.
template <class T, int row_tiles, int column_tiles, class Tile>
DEVICE void multiply_rows_int8(float (&sums)[row_tiles][column_tiles][4], const uint32_t (&a)[row_tiles][4],
                               const LaneCursor<Tile>& b) {
  static_assert(column_tiles * 8 == 2 * Tile::columns && Tile::rows == 16);
  UNROLL for (int chunk = 0; chunk < Tile::columns / 8; chunk += 2) {
    uint32_t right[4];  // of this chunk: keys 0 to 7, and 8 to 15; the same of the next chunk
    ldmatrix_x4_trans(right, b.at(0, chunk));
    UNROLL for (int next = 0; next < 2; ++next) {
      const uint32_t low = right[2 * next], high = right[2 * next + 1];
      UNROLL for (int r = 0; r < row_tiles; ++r) {
        float(&even)[4] = sums[r][2 * (chunk + next)];
        float(&odd)[4] = sums[r][2 * (chunk + next) + 1];
        mma_m16n8k16<T>(even, a[r], pair_of_int8<T, 0, 2>(low), pair_of_int8<T, 0, 2>(high));
        mma_m16n8k16<T>(odd, a[r], pair_of_int8<T, 1, 3>(low), pair_of_int8<T, 1, 3>(high));
      }
    }
  }
}

// Probabilities times the scales of their values, as fp16 can bear them: of values about 1e-4 such a product
// would lose its digits, of large ones be infinite. So each row has a unit, a power of two above the largest
// product so far; where it moves, the row's sums move along. What is lost is below 2^-24 of the largest. A
// row's unit knows nothing of what the row does not see. (bf16 has the range of float, and needs none of it.)
template <int row_tiles>
struct RowUnits {
  float unit[row_tiles][2] = {};

  template <int out_tiles>
  DEVICE void fit(float (&products)[row_tiles][2][4], float (&out)[row_tiles][out_tiles][4]) {
    UNROLL for (int r = 0; r < row_tiles; ++r)
      UNROLL for (int half = 0; half < 2; ++half) {
        float most = 0.0f;
        UNROLL for (int c = 0; c < 2; ++c)
          most = max(most, max(products[r][c][2 * half], products[r][c][2 * half + 1]));
        most = max(most, shfl_xor(most, 1));
        most = max(most, shfl_xor(most, 2));  // of the four lanes that share the row
        if (most > unit[r][half]) {
          uint32_t bits;
          memcpy(&bits, &most, 4);
          bits = (bits & 0x7f800000u) + 0x00800000u;
          const float before = unit[r][half];
          memcpy(&unit[r][half], &bits, 4);
          const float shrink = before / unit[r][half];
          UNROLL for (int d = 0; d < out_tiles; ++d)
            UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e) out[r][d][e] *= shrink;
        }
        uint32_t bits;
        memcpy(&bits, &unit[r][half], 4);
        bits = 0x7f000000u - bits;  // of 1 / unit; before there is a unit all products are zeros
        float per_unit;
        memcpy(&per_unit, &bits, 4);
        UNROLL for (int c = 0; c < 2; ++c)
          UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e) products[r][c][e] *= per_unit;
      }
  }
};

// A tile's scales: of 16 keys, and of their values.
struct Int8Scales {
  shared_addr base;

  // A lane copies one of them.
  DEVICE void copy(Global<const float> keys, Global<const float> values, const Ring& ring, const SlotRun& run) const {
    const int row = lane_id() % 16;
    const bool there = row < run.count;
    cp_async4(base + 4 * lane_id(), (lane_id() < 16 ? keys : values) + ring.advance(run.slot, there ? row : 0), there);
  }
  DEVICE void keys(float (&scales)[4]) const { of_columns(base, scales); }
  DEVICE void values(float (&scales)[4]) const { of_columns(base + 64, scales); }

 private:
  // Of the columns that a lane has in two fragments of scores: 2 t, 2 t + 1, and the same 8 further on.
  DEVICE static void of_columns(shared_addr from, float (&scales)[4]) {
    UNROLL for (int c = 0; c < 2; ++c) {
      const FloatPair pair = load_shared<FloatPair>(from + 32 * c + lane_id() % 4 * 8);
      scales[2 * c] = pair.x, scales[2 * c + 1] = pair.y;
    }
  }
};

}  // namespace almostgpt
