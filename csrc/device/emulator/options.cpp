// The options and where they come from.
#include <cerrno>
#include <cstdlib>

#include "device/emulator/card.h"
#include "device/emulator/emulator.h"

namespace almostgpt::emulator {
namespace {

// Read from the environment when they are first asked for, and again as long as that throws.
Options& chosen() {
  static Options options = options_from_environment();
  return options;
}

[[noreturn]] void refuse(const char* name, const std::string& value, const std::string& allowed) {
  throw std::invalid_argument(std::string(name) + "=" + value + ": must be " + allowed);
}

bool flag(const char* name, bool otherwise) {
  const char* value = std::getenv(name);
  if (!value || !*value) return otherwise;
  if (std::string(value) == "0") return false;
  if (std::string(value) == "1") return true;
  refuse(name, value, "0 or 1");
}

uint64_t number(const char* name, uint64_t otherwise, uint64_t most) {
  const char* value = std::getenv(name);
  if (!value || !*value) return otherwise;
  char* end = nullptr;
  errno = 0;
  const unsigned long long result = std::strtoull(value, &end, 10);
  if (*value < '0' || *value > '9' || *end || errno || result > most)
    refuse(name, value, "a whole number up to " + std::to_string(most));
  return result;
}

}  // namespace

Options options_from_environment() {
  Options result;
  result.seed = number("ALMOSTGPT_EMULATOR_SEED", 0, INT64_MAX);
  result.check = flag("ALMOSTGPT_EMULATOR_CHECK", true);
  result.abort = flag("ALMOSTGPT_EMULATOR_ABORT", false);
  result.multiprocessors = static_cast<int>(number("ALMOSTGPT_EMULATOR_MULTIPROCESSORS", 0, 100000));
  if (const char* value = std::getenv("ALMOSTGPT_EMULATOR_ASYNC")) {
    const std::string name = value;
    if (name == "late" || name.empty()) result.asynchrony = Asynchrony::late;
    else if (name == "early") result.asynchrony = Asynchrony::early;
    else if (name == "random") result.asynchrony = Asynchrony::random;
    else refuse("ALMOSTGPT_EMULATOR_ASYNC", name, "late, early or random");
  }
  return result;
}

const Options& options() { return chosen(); }
void set_options(const Options& options) {
  const NoOtherSession lock;
  chosen() = options;
}

}  // namespace almostgpt::emulator
