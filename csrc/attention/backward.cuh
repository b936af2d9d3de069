// What the kernels of the backward pass hand to each other.
#pragma once

#include "attention/fragments.cuh"
#include "attention/heads.cuh"

namespace almostgpt {

// dQ is summed in float32, in the order in which the tensor cores leave it in registers: 16 rows x 8
// columns of it are 128 floats side by side, of which lane l has four. Four at a time where sums take
// vectors (sm_90) or need no atomics; before, one at a time, so that a warp's lanes meet one line.
struct DqOrder {
  bool vectors;

  DEVICE int at(int lane, int element) const { return vectors ? 4 * lane + element : 32 * element + lane; }
};

// What all kernels of one backward pass agree on.
struct BackwardPlan {
  int width;        // head_dim, padded to that of the tiles
  int padded_rows;  // queries, padded to a multiple of kRowBlock
  int tile_queries, tile_keys;
  int key_parts;  // blocks that share a key head's query heads
  DqOrder dq_order;
};

template <class T>
struct BackwardArgs {
  HeadsOf<const T> q, k, v, dout;
  HeadsOf<T> dk, dv;
  // Of each query: its lse in log2, delta, and dq, (batch, heads, padded_rows, …).
  Global<const float> lse2, delta;
  Global<float> dq;
  DqOrder dq_order;
  int padded_rows;  // a multiple of kRowBlock
  // In order: how many tiles have been begun, and then which tile of keys may add to each tile of queries.
  Global<int32_t> turns;
  Mask mask;
  ScoreArgs scores;
  Schedule schedule;
  int heads, kv_heads, key_parts, head_dim;

  DEVICE int64_t row_of(int batch, int head) const { return (int64_t{batch} * heads + head) * padded_rows; }
  template <class Tile>
  DEVICE Global<int32_t> turn_of(int batch, int head, int query) const {
    return turns + (1 + (int64_t{batch} * heads + head) * (padded_rows / Tile::queries) + query / Tile::queries);
  }
};

struct alignas(8) Pair { float x, y; };

// The shared memory of the main kernel.
template <class Tile>
struct BackwardMemory {
  using KTile = SharedTile<Tile::keys, Tile::head_dim>;
  using QTile = SharedTile<Tile::queries, Tile::head_dim>;
  using STile = SharedTile<Tile::keys, Tile::queries>;

  DEVICE KTile k() const { return {shared_base()}; }
  DEVICE KTile v() const { return {shared_base() + KTile::bytes}; }
  DEVICE STile ds() const { return {shared_base() + 2 * KTile::bytes}; }
  DEVICE QTile q(int stage) const { return {stages() + stage * (2 * QTile::bytes)}; }
  DEVICE QTile dout(int stage) const { return {stages() + stage * (2 * QTile::bytes) + QTile::bytes}; }
  DEVICE shared_addr lse2(int stage) const { return rows() + stage * (2 * Tile::row_bytes); }
  DEVICE shared_addr delta(int stage) const { return rows() + stage * (2 * Tile::row_bytes) + Tile::row_bytes; }
  DEVICE Ranges seen() const { return {rows() + Tile::stages * (2 * Tile::row_bytes)}; }

 private:
  DEVICE shared_addr stages() const { return shared_base() + 2 * KTile::bytes + STile::bytes; }
  DEVICE shared_addr rows() const { return stages() + Tile::stages * (2 * QTile::bytes); }
};

int attention_prepare_backward(const AttentionInputs& inputs, const AttentionGradients& gradients,
                               const AttentionScratch& scratch, const BackwardPlan& plan, void* stream);
int attention_finish_backward(const AttentionInputs& inputs, const AttentionGradients& gradients,
                              const AttentionScratch& scratch, const BackwardPlan& plan, void* stream);
template <int head_dim>
int attention_backward_sm80(const AttentionInputs& inputs, const AttentionGradients& gradients,
                            const AttentionScratch& scratch, const BackwardPlan& plan, const Card& card, void* stream);

}  // namespace almostgpt
