#include "device/emulator/location.h"

#include <cstring>
#include <map>
#include <utility>
#include <vector>

namespace almostgpt::emulator {
namespace {

std::vector<Location>& locations() {
  static std::vector<Location> all(1);  // number 0 is nowhere
  return all;
}

}  // namespace

std::string text(Location location) {
  if (location.line == 0) return "(nowhere)";
  const char* slash = std::strrchr(location.file, '/');
  return std::string(slash ? slash + 1 : location.file) + ":" + std::to_string(location.line);
}

uint16_t number_of(Location location) {
  static std::map<std::pair<const char*, int>, uint16_t> numbers;
  static struct { Location location; uint16_t number; } recent[256];
  auto& slot = recent[(reinterpret_cast<uintptr_t>(location.file) ^ static_cast<unsigned>(location.line) * 31u) & 255];
  if (slot.location == location) return slot.number;
  auto& all = locations();
  auto [found, added] = numbers.emplace(std::make_pair(location.file, location.line), static_cast<uint16_t>(all.size()));
  if (added) all.push_back(location);
  slot = {location, found->second};
  return found->second;
}

Location location_of(uint16_t number) { return locations()[number]; }

}  // namespace almostgpt::emulator
