// Findings: how a check says what it found.
#pragma once

#include <string>

#include "device/emulator/emulator.h"
#include "device/emulator/location.h"

namespace almostgpt::emulator {

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// Ends the launch with an Error: what was found, by which thread of which block of which kernel, and what
// to do about it: `advice`, or else what is advised for all findings of that kind. Within a kernel the
// exception unwinds the fiber of the thread that failed; the other fibers are abandoned.
[[noreturn]] void fail(const char* kind, Location at, const std::string& what, const char* advice = nullptr);

}  // namespace almostgpt::emulator
