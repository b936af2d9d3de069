// Where in the source a primitive was called: in messages, statistics and the sites of faults.
#pragma once

#include <cstdint>
#include <string>

namespace almostgpt::emulator {

struct Location {
  const char* file = "";
  int line = 0;

  // The default argument of every primitive. The call is needed: with a braced Location{__builtin_FILE(),
  // __builtin_LINE()} as the default, g++ gives the line of the declaration.
  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return Location{file, line};
  }
  bool operator==(const Location& other) const { return file == other.file && line == other.line; }
  bool operator!=(const Location& other) const { return !(*this == other); }
};

// "rms_norm.cu:88"
std::string text(Location location);

// Locations by number, so that a shadow cell holds one in 16 bits.
uint16_t number_of(Location location);
Location location_of(uint16_t number);

}  // namespace almostgpt::emulator
