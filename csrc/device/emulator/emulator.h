// The emulator as its host sees it: a call of an op is a Session, and a finding of the checker is an Error.
//
// One session runs at a time (a lock). Within it the kernels that launch() starts see only the memory
// that the session was told of. Options, the injected fault and the statistics belong to the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "device/emulator/host_device.h"
#include "device/types.h"

namespace almostgpt::emulator {

// When cp.async, TMA and wgmma touch memory: as late as their wait allows, at once, or at random.
enum class Asynchrony { late, early, random };

struct Options {
  uint64_t seed = 0;  // 0: warps and lanes in order; else a random schedule of threads and blocks
  Asynchrony asynchrony = Asynchrony::late;
  bool check = true;        // races, initialisation, in-flight reads; bounds are always checked
  bool abort = false;       // abort() at an error, for a debugger, rather than throw
  int multiprocessors = 0;  // of the card that is played; 0: as many as it has
};

// ALMOSTGPT_EMULATOR_SEED, _ASYNC (late, early, random), _CHECK (0, 1), _ABORT (0, 1), _MULTIPROCESSORS.
// Throws std::invalid_argument for a value that is none.
Options options_from_environment();
const Options& options();
void set_options(const Options& options);

// A finding. what() is the whole message: kind, kernel, block, thread, source lines, and what to do.
class Error : public std::runtime_error {
 public:
  Error(std::string kind, const std::string& message) : runtime_error(message), kind(std::move(kind)) {}
  const std::string kind;  // "race", "deadlock", "out-of-bounds", …: docs/emulator.md lists them
};

enum class Use { input, output, input_output };

// What a card of this compute capability is like; throws Error("card") for one that is not known.
device::Card card_of(int major, int minor);

class Session {
 public:
  // Plays that card until destroyed.
  Session(int major, int minor);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Memory that kernels may touch: bytes of `output` are uninitialised until a kernel writes them, and
  // those of `input` may not be written. The name is used in messages and statistics.
  void buffer(const char* name, const void* address, size_t bytes, Use use);
};

// Counted since the last reset: JSON {"kernels": {NAME: {"launches", "blocks", "shared_conflicts",
// "global_read_bytes", "global_written_bytes", "global_sectors", "buffers": {NAME: {"read", "written"}}}}}.
// Bytes are those that threads and TMA ask for, before any cache; an atomic counts as written. Sectors are
// of 32 bytes, for each access of a warp. Conflicts are wavefronts of shared memory beyond those of an
// access without any.
std::string statistics();
void reset_statistics();

// Every call of a synchronising primitive that ran since the last reset, with what may be done to it:
// JSON [{"site": "rms_norm.cuh:65 cta_sync", "mutations": ["drop"]}, …] in order of appearance.
std::string sites();
// From now on the call at that site is dropped or weakened; "" for none. Throws std::invalid_argument for
// a mutation that no primitive has, and for a second fault.
void inject(const std::string& site, const std::string& mutation);
// Whether that call has been reached since.
bool injected_ran();

}  // namespace almostgpt::emulator
