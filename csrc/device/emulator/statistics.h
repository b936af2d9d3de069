// Counters of each kernel: what it would cost a GPU in memory traffic.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "device/emulator/location.h"

namespace almostgpt::emulator {

struct Warp;

struct Traffic {
  uint64_t read = 0, written = 0;  // bytes
};

struct KernelStatistics {
  uint64_t launches = 0, blocks = 0;
  uint64_t shared_conflicts = 0;  // wavefronts beyond the first that each access needs
  uint64_t global_sectors = 0;    // of 32 bytes, touched by each access of a warp
  Traffic global;
  std::map<std::string, Traffic> buffers;
};

KernelStatistics& statistics_of(const std::string& kernel);

// A lane accesses memory by itself. Such accesses are grouped as the hardware would make them: those of
// all lanes at the same line, the same time around. A group is counted when every lane of the warp has
// come, or when the lanes are together next. A lane that is far ahead of others lets them catch up.
void count_access(Warp& warp, int lane, Location at, bool shared, bool write, uint64_t address, uint32_t bytes);
void lanes_are_together(Warp& warp);

// The rows of one 8x8 matrix of ldmatrix, read at once.
void count_matrix_rows(const uint32_t (&addresses)[8]);
// A contiguous run of global memory that an asynchronous unit moves.
void count_sectors(uint64_t address, uint64_t bytes);

}  // namespace almostgpt::emulator
