// Which keys a sequence's new tokens see, as tiles, and how those come into shared memory.
#pragma once

#include "attention/shared_tile.cuh"
#include "cache/decode_tiles.h"
#include "cache/ring.cuh"

namespace almostgpt {

// `count` slots from `slot` on, around the ring at most once.
struct SlotRun {
  int slot, count;
};

// The sinks' tiles come first, then those of the window, by position: so a tile is a run of positions, and
// which of them a row sees is a matter of two comparisons, wherever the ring begins.
struct KeyTiles {
  Ring ring;
  int sinks;       // of them that are there
  int begin, end;  // the positions beyond the sinks that any of the new tokens sees
  int begin_slot;
  int in_window;  // positions that one token sees, beside the sinks

  // `before` tokens, and in all `end`; 0: nobody sees anything.
  DEVICE KeyTiles(const Ring& ring, int window, int before, int end)
      : ring(ring), sinks(min(ring.sinks, end)), end(end), in_window(window - ring.sinks) {
    // Of more positions than slots, which a call must not have, the last ones.
    begin = max(max(ring.sinks, before - in_window + 1), end - ring.size());
    begin_slot = ring.slot(begin);
  }

  DEVICE int tiles() const { return sink_tiles() + (end > begin ? tiles_of(end - begin) : 0); }
  DEVICE bool are_sinks(int tile) const { return tile < sink_tiles(); }
  DEVICE int position(int tile) const { return are_sinks(tile) ? steps(tile) : begin + steps(tile); }
  DEVICE SlotRun slots_of(int tile) const {
    if (are_sinks(tile)) return {steps(tile), sinks - steps(tile)};
    return {ring.advance(begin_slot, steps(tile)), end - begin - steps(tile)};
  }
  // Whether every new token sees all of a tile; the first stands at `before`.
  DEVICE bool all_see(int tile, int before) const {
    const int first = position(tile), last = first + kDecodeKeys - 1;
    return last <= before && (are_sinks(tile) ? last < sinks : first >= end - in_window);
  }

 private:
  DEVICE static int tiles_of(int keys) { return (keys + kDecodeKeys - 1) / kDecodeKeys; }
  DEVICE int sink_tiles() const { return tiles_of(sinks); }
  DEVICE int steps(int tile) const { return (are_sinks(tile) ? tile : tile - sink_tiles()) * kDecodeKeys; }
};

// Keys and values into tiles of a warp's own. A row of a tile is a slot's columns in units of 16 bytes.
template <class Tile, class Stored>
DEVICE void copy_slots(const Tile& k_tile, const Tile& v_tile, Global<const Stored> keys, Global<const Stored> values,
                       const Ring& ring, const SlotRun& run, int head_dim) {
  constexpr int chunks = Tile::columns / 8, step = 32 / chunks, chunk_width = 16 / static_cast<int>(sizeof(Stored));
  constexpr int width = chunks * chunk_width;
  static_assert(32 % chunks == 0 && Tile::rows % step == 0);
  const int first = lane_id() / chunks, chunk = lane_id() % chunks;
  if (run.count >= Tile::rows && run.slot + Tile::rows <= ring.capacity && head_dim == width) {
    // All of them, one after the other: addresses at constant distances take no instructions.
    const int64_t from = int64_t{run.slot + first} * width + chunk * chunk_width;
    UNROLL for (int i = 0; i < Tile::rows / step; ++i) {
      cp_async16(k_tile.at(first + i * step, chunk), keys + from + i * step * width);
      cp_async16(v_tile.at(first + i * step, chunk), values + from + i * step * width);
    }
    return;
  }
  const bool column_there = chunk * chunk_width < head_dim;
  UNROLL_BY(1)
  for (int row = first; row < Tile::rows; row += step) {
    const bool there = column_there && row < run.count;
    const int64_t from = there ? int64_t{ring.advance(run.slot, row)} * head_dim + chunk * chunk_width : 0;
    cp_async16(k_tile.at(row, chunk), keys + from, there);
    cp_async16(v_tile.at(row, chunk), values + from, there);
  }
}

}  // namespace almostgpt
