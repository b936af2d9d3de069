// Where the token of a position is kept.
#pragma once

#include "cache/cache.h"
#include "device/device.cuh"

namespace almostgpt {

using namespace device;

// The first `sinks` positions have slots of their own, the others take turns in the rest.
struct Ring {
  int capacity, sinks;

  DEVICE int size() const { return capacity - sinks; }
  DEVICE int slot(int position) const { return position < sinks ? position : sinks + (position - sinks) % size(); }
  // `steps` slots further, no more than once around.
  DEVICE int advance(int slot, int steps) const {
    slot += steps;
    return slot < capacity ? slot : slot - size();
  }
};

// Whatever is written there, no slot is outside of the cache: positions have 2^29 tokens to go.
DEVICE int tokens_before(Global<const int32_t> lengths, int batch) {
  return max(0, min(load_global<Cache::read_only>(lengths + batch), 1 << 30));
}

}  // namespace almostgpt
