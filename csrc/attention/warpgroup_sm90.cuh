// Products of a warpgroup from tiles in shared memory, and the maps by which TMA brings these.
#pragma once

#include "attention/heads.cuh"

namespace almostgpt {

// --- products -------------------------------------------------------------------------------------------

// A tile in panels of 64 columns is what wgmma and TMA call swizzled by 128 bytes: 8 rows of a panel take
// 1,024 bytes. As an operand its columns may be the inner dimension of the product (K-major): 16 of them
// are 32 bytes of each row; or its rows may be (MN-major): 16 of them are 2,048 bytes, and the next 64
// columns are a panel further.
template <class Tile> DEVICE uint64_t by_columns(const Tile& tile) {
  return matrix_descriptor(tile.base, 16, 1024, Tile::span);
}
template <class Tile> HOST_DEVICE constexpr uint32_t column_offset(int column) {
  return column / 64 * (Tile::rows * Tile::line) + column % 64 * 2;
}
template <class Tile> DEVICE uint64_t by_rows(const Tile& tile) {
  return matrix_descriptor(tile.base, Tile::rows * Tile::line, 1024, Tile::span);
}
template <class Tile> HOST_DEVICE constexpr uint32_t row_offset(int row) { return row * Tile::line; }

// The registers of a warpgroup's sums as wgmma takes them: those of fragments, one after another.
template <int tiles> DEVICE float (&flat(float (&fragments)[1][tiles][4]))[4 * tiles] {
  return reinterpret_cast<float(&)[4 * tiles]>(fragments);
}

// Issues sums = A B^T over all columns of the tiles; wgmma_fence before, wgmma_commit after.
template <class T, class TileA, class TileB, int tiles>
DEVICE void issue_product(float (&sums)[1][tiles][4], const TileA& a, const TileB& b) {
  static_assert(TileA::columns == TileB::columns && 8 * tiles == TileB::rows);
  const uint64_t left = by_columns(a), right = by_columns(b);
  UNROLL for (int k = 0; k < TileA::columns; k += 16)
    wgmma_ss<T, TileB::rows>(flat(sums), advanced(left, column_offset<TileA>(k)),
                             advanced(right, column_offset<TileB>(k)), k > 0);
}

// Issues sums += A B, A in registers, 16 columns each.
template <class T, class Tile, int tiles, int slices>
DEVICE void issue_rows_product(float (&sums)[1][tiles][4], const uint32_t (&a)[slices][4], const Tile& b) {
  static_assert(16 * slices == Tile::rows && 8 * tiles == Tile::columns);
  const uint64_t right = by_rows(b);
  UNROLL for (int slice = 0; slice < slices; ++slice)
    wgmma_rs<T, Tile::columns, true>(flat(sums), a[slice], advanced(right, row_offset<Tile>(16 * slice)), true);
}

// --- maps -----------------------------------------------------------------------------------------------

// The strides of dimensions 1 on, in bytes. Of a dimension of 1 it may be anything: here what it would be in a
// tensor that is contiguous up to there.
template <int rank>
void set_map_strides(uint64_t (&bytes)[rank - 1], const uint64_t (&dims)[rank], const int64_t (&elements)[rank - 1]) {
  uint64_t inner = 2 * dims[0];
  for (int i = 0; i < rank - 1; ++i) {
    bytes[i] = dims[i + 1] == 1 ? inner : static_cast<uint64_t>(2 * elements[i]);
    inner = bytes[i] * dims[i + 1];
  }
}

// (batch, heads, rows, head_dim), brought in boxes of `box_rows` rows and 64 columns. What lies beyond the
// last row or column comes as zeros.
template <class T>
int make_heads_map(TensorMap* map, const void* data, const HeadStrides& strides, const AttentionShape& shape,
                   int heads, int rows, int box_rows) {
  const uint64_t dims[] = {static_cast<uint64_t>(shape.head_dim), static_cast<uint64_t>(rows),
                           static_cast<uint64_t>(heads), static_cast<uint64_t>(shape.batch)};
  uint64_t bytes[3];
  set_map_strides<4>(bytes, dims, {strides.row, strides.head, strides.batch});
  const uint32_t box[] = {64, static_cast<uint32_t>(box_rows), 1, 1};
  return make_tensor_map<T>(map, data, 4, dims, bytes, box, SwizzleSpan::bytes128);
}

// (batch, heads / pack, queries, pack, head_dim): boxes of 64 rows, which are tokens times the heads of a pack.
template <class T>
int make_packed_map(TensorMap* map, const void* data, const HeadStrides& strides, const AttentionShape& shape,
                    int pack) {
  const int packs = shape.heads / pack;
  const uint64_t dims[] = {static_cast<uint64_t>(shape.head_dim), static_cast<uint64_t>(pack),
                           static_cast<uint64_t>(shape.queries), static_cast<uint64_t>(packs),
                           static_cast<uint64_t>(shape.batch)};
  uint64_t bytes[4];
  set_map_strides<5>(bytes, dims, {strides.head, strides.row, strides.head * pack, strides.batch});
  const uint32_t box[] = {64, static_cast<uint32_t>(pack), static_cast<uint32_t>(64 / pack), 1, 1};
  return make_tensor_map<T>(map, data, 5, dims, bytes, box, SwizzleSpan::bytes128);
}

}  // namespace almostgpt
