// The buffers of the session and the shadow of those that may be written.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "device/emulator/emulator.h"
#include "device/emulator/launch.h"

namespace almostgpt::emulator {

// How an access treats those of others: two strong ones (relaxed, atomic) are no race; memory that is
// read by read_only loads is written by nobody while the kernel runs.
enum class Access { load, read_only_load, strong_load, store, strong_store, atomic };

// The shadow of a 4-byte word, during a launch.
struct GlobalCell {
  struct Entry {
    uint32_t block;  // its index + 1; 0: no access
    uint32_t time;
    uint16_t actor, location;
    uint8_t mask : 4;  // bytes of the word
    bool write : 1, strong : 1, async : 1;
  };
  static_assert(sizeof(Entry) == 16);
  Entry entries[4];
  uint8_t written, read_only;  // bytes, in this launch
};

struct Buffer {
  static constexpr size_t kChunk = 512;  // words of shadow that are made at once
  std::string name;
  unsigned char* begin;
  size_t bytes;
  Use use;
  std::vector<uint8_t> initialised;                  // of an output: bytes of each word
  std::vector<std::unique_ptr<GlobalCell[]>> shadow;  // of the running launch
  Traffic* traffic = nullptr;                        // of the running kernel

  // Words are those of the address space, of which the buffer need not begin with a whole one.
  size_t word_of(const void* address) const {
    return reinterpret_cast<uintptr_t>(address) / 4 - reinterpret_cast<uintptr_t>(begin) / 4;
  }
  size_t words() const { return bytes ? word_of(begin + bytes - 1) + 1 : 0; }
  GlobalCell& cell(size_t word);
};

// Of the running session, in the order in which they were named.
std::vector<Buffer>& buffers();
void add_buffer(const char* name, const void* address, size_t bytes, Use use);

void begin_global_memory(Launch& launch);

// Bounds, alignment and rights; the traffic is counted; unless checks are off, races.
void check_global(const Actor& actor, const void* address, size_t bytes, size_t alignment, Access access,
                  const char* what, Location at);

}  // namespace almostgpt::emulator
