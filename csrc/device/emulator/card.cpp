#include "device/emulator/card.h"

#include "device/emulator/report.h"
#include "device/emulator/runtime.h"

namespace almostgpt::emulator {
namespace {

constexpr int KiB = 1024;

// Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the numbers of
// multiprocessors are those of A100, GA102, L40S, H100 SXM, B200 and RTX 5090.
constexpr CardLimits kCards[] = {
    {{8, 0, 108, 163 * KiB}, 164 * KiB, 2048, 32},
    {{8, 6, 84, 99 * KiB}, 100 * KiB, 1536, 16},
    {{8, 9, 142, 99 * KiB}, 100 * KiB, 1536, 24},
    {{9, 0, 132, 227 * KiB}, 228 * KiB, 2048, 32},
    {{10, 0, 148, 227 * KiB}, 228 * KiB, 2048, 32},
    {{12, 0, 170, 99 * KiB}, 100 * KiB, 1536, 24},
};

}  // namespace

const CardLimits* limits_of(int major, int minor) {
  for (const CardLimits& limits : kCards)
    if (limits.card.major == major && limits.card.minor == minor) return &limits;
  return nullptr;
}

device::Card card_of(int major, int minor) {
  const CardLimits* limits = limits_of(major, minor);
  if (!limits) fail("card", {}, format("no card of compute capability %d.%d is known", major, minor));
  return limits->card;
}

device::Card session_card() {
  const CardLimits* limits = session_limits();
  if (!limits) fail("session", {}, "a card was asked for outside of a session");
  device::Card card = limits->card;
  if (options().multiprocessors > 0) card.multiprocessors = options().multiprocessors;
  return card;
}

}  // namespace almostgpt::emulator
