// The cards that can be played, and the session that chooses one.
#pragma once

#include "device/emulator/host_device.h"
#include "device/types.h"

namespace almostgpt::emulator {

using device::Dim3;

struct CardLimits {
  device::Card card;
  int shared_bytes_per_multiprocessor;
  int threads_per_multiprocessor;
  int blocks_per_multiprocessor;
};

// Every block takes this much shared memory of a multiprocessor besides its own.
constexpr int kReservedSharedBytes = 1024;

// Null for a card that is not known.
const CardLimits* limits_of(int major, int minor);

// Of the running session, or null.
const CardLimits* session_limits();

// Nobody has a session meanwhile but this thread itself: for what belongs to the process.
class NoOtherSession {
 public:
  NoOtherSession();
  ~NoOtherSession();

 private:
  const bool locked_;
};

}  // namespace almostgpt::emulator
