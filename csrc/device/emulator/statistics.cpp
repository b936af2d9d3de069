#include "device/emulator/statistics.h"

#include <algorithm>

#include "device/emulator/emulator.h"
#include "device/emulator/faults.h"
#include "device/emulator/launch.h"
#include "device/emulator/scheduler.h"

namespace almostgpt::emulator {
namespace {

// So many groups of accesses may be open in a warp.
constexpr size_t kOpenGroups = 128;

std::map<std::string, KernelStatistics>& kernels() {
  static std::map<std::string, KernelStatistics> all;
  return all;
}

// Shared memory has 32 banks of 4 bytes; an access of one wavefront takes as many as the most distinct
// words of one bank. 8 bytes a lane are two wavefronts, of half-warps, and 16 bytes four, of quarters.
int bank_conflicts(const AccessGroup& group) {
  const int lanes_at_once = group.bytes == 16 ? 8 : group.bytes == 8 ? 16 : 32;
  int conflicts = 0;
  for (int first = 0; first < 32; first += lanes_at_once) {
    uint32_t words[32];
    int count = 0;
    for (int lane = first; lane < first + lanes_at_once; ++lane)
      if (group.lanes >> lane & 1)
        for (uint32_t byte = 0; byte < group.bytes; byte += 4)
          words[count++] = static_cast<uint32_t>(group.addresses[lane] + byte) / 4;
    std::sort(words, words + count);
    count = static_cast<int>(std::unique(words, words + count) - words);
    int in_bank[32] = {}, most = 1;
    for (int i = 0; i < count; ++i) most = std::max(most, ++in_bank[words[i] % 32]);
    conflicts += most - 1;
  }
  return conflicts;
}

int sectors(const AccessGroup& group) {
  uint64_t touched[32];
  int count = 0;
  for (uint32_t lanes = group.lanes; lanes; lanes &= lanes - 1)
    touched[count++] = group.addresses[__builtin_ctz(lanes)] / 32;
  std::sort(touched, touched + count);
  return static_cast<int>(std::unique(touched, touched + count) - touched);
}

void evaluate(const AccessGroup& group) {
  KernelStatistics& statistics = running->statistics;
  if (group.shared) statistics.shared_conflicts += bank_conflicts(group);
  else statistics.global_sectors += sectors(group);
}

// No further group may be opened. If the lane has joined the last one, it is ahead, and the one that is
// most behind goes on; without such a lane, or where the lanes go different ways, the groups are closed.
void let_others_catch_up(Warp& warp, int lane) {
  int behind = lane;
  uint32_t least = warp.cursor[lane] == kOpenGroups ? kOpenGroups : 0;
  for (uint32_t rest = warp.ready & ~(1u << lane); rest; rest &= rest - 1) {
    const int other = __builtin_ctz(rest);
    if (warp.cursor[other] < least) least = warp.cursor[behind = other];
  }
  if (behind == lane) lanes_are_together(warp);
  else switch_to_lane(warp, behind);
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') result += '\\';
    result += letter;
  }
  return result + '"';
}

}  // namespace

KernelStatistics& statistics_of(const std::string& kernel) { return kernels()[kernel]; }

void count_access(Warp& warp, int lane, Location at, bool shared, bool write, uint64_t address, uint32_t bytes) {
  const uint16_t location = number_of(at);
  const uint32_t bit = 1u << lane;
  auto& groups = warp.accesses;
  const auto fits = [&](const AccessGroup& group) {
    return group.location == location && !(group.lanes & bit) && group.shared == shared && group.write == write &&
           group.bytes == bytes;
  };
  // Where the lanes do the same, the next access of a lane belongs to the next group.
  size_t i = warp.cursor[lane];
  while (i < groups.size() && !fits(groups[i])) ++i;
  if (i >= groups.size()) {
    const size_t end = std::min<size_t>(warp.cursor[lane], groups.size());
    for (i = 0; i < end && !fits(groups[i]);) ++i;
    if (i == end) i = groups.size();
  }
  if (i == groups.size()) {
    if (groups.size() == kOpenGroups) {
      let_others_catch_up(warp, lane);
      count_access(warp, lane, at, shared, write, address, bytes);
      return;
    }
    groups.emplace_back();
    AccessGroup& group = groups.back();
    group.location = location;
    group.bytes = static_cast<uint8_t>(bytes);
    group.shared = shared;
    group.write = write;
    group.lanes = 0;
  }
  AccessGroup& group = groups[i];
  group.lanes |= bit;
  group.addresses[lane] = address;
  warp.cursor[lane] = static_cast<uint32_t>(i + 1);
  // The last lane to come closes all groups before too: they are in the order of the program.
  if (group.lanes == warp.alive && i + 1 == groups.size()) lanes_are_together(warp);
}

void lanes_are_together(Warp& warp) {
  if (warp.accesses.empty()) return;
  for (const AccessGroup& group : warp.accesses) evaluate(group);
  warp.accesses.clear();
  std::fill(std::begin(warp.cursor), std::end(warp.cursor), 0u);
}

void count_matrix_rows(const uint32_t (&addresses)[8]) {
  // Eight rows of 16 bytes are one wavefront if they lie in eight different groups of four banks.
  int in_banks[8] = {}, most = 1;
  for (int i = 0; i < 8; ++i) {
    const bool again = std::find(addresses, addresses + i, addresses[i]) != addresses + i;
    if (!again) most = std::max(most, ++in_banks[addresses[i] / 16 % 8]);
  }
  running->statistics.shared_conflicts += most - 1;
}

void count_sectors(uint64_t address, uint64_t bytes) {
  running->statistics.global_sectors += (address + bytes - 1) / 32 - address / 32 + 1;
}

std::string statistics() {
  const NoOtherSession lock;
  const auto number = [](uint64_t value) { return std::to_string(value); };
  std::string json = "{\"kernels\": {";
  const char* separator = "";
  for (const auto& [name, kernel] : kernels()) {
    if (kernel.launches == 0) continue;
    json += separator + quoted(name) + ": {\"launches\": " + number(kernel.launches) + ", \"blocks\": " +
            number(kernel.blocks) + ", \"shared_conflicts\": " + number(kernel.shared_conflicts) +
            ", \"global_read_bytes\": " + number(kernel.global.read) + ", \"global_written_bytes\": " +
            number(kernel.global.written) + ", \"global_sectors\": " + number(kernel.global_sectors) +
            ", \"buffers\": {";
    const char* inner = "";
    for (const auto& [buffer, traffic] : kernel.buffers) {
      json += inner + quoted(buffer) + ": {\"read\": " + number(traffic.read) + ", \"written\": " +
              number(traffic.written) + "}";
      inner = ", ";
    }
    json += "}}";
    separator = ", ";
  }
  return json + "}}";
}

void reset_statistics() {
  const NoOtherSession lock;
  kernels().clear();
  forget_sites();
}

}  // namespace almostgpt::emulator
