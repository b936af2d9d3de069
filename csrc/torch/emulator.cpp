// torch.ops.almostgpt_emulator: what kernels/emulator.py sets and asks of the emulator.

#include "device/emulator/emulator.h"

#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>

namespace almostgpt::binding {
namespace {

using emulator::Asynchrony;

Asynchrony asynchrony_of(const std::string& name) {
  if (name == "late") return Asynchrony::late;
  if (name == "early") return Asynchrony::early;
  if (name == "random") return Asynchrony::random;
  throw std::invalid_argument("asynchrony must be late, early or random, not " + name);
}

std::string name_of(Asynchrony asynchrony) {
  switch (asynchrony) {
    case Asynchrony::late: return "late";
    case Asynchrony::early: return "early";
    case Asynchrony::random: return "random";
  }
  return "";
}

void configure(int64_t seed, std::string asynchrony, bool check, int64_t multiprocessors) {
  emulator::Options options = emulator::options();  // abort stays as the environment has it
  options.seed = static_cast<uint64_t>(seed);
  options.asynchrony = asynchrony_of(asynchrony);
  options.check = check;
  options.multiprocessors = static_cast<int>(multiprocessors);
  emulator::set_options(options);
}

// The arguments of configure, as JSON.
std::string options() {
  const emulator::Options& options = emulator::options();
  return "{\"seed\": " + std::to_string(options.seed) + ", \"asynchrony\": \"" +
         name_of(options.asynchrony) + "\", \"check\": " + (options.check ? "true" : "false") +
         ", \"multiprocessors\": " + std::to_string(options.multiprocessors) + "}";
}

std::string statistics() { return emulator::statistics(); }
void reset_statistics() { emulator::reset_statistics(); }
std::string sites() { return emulator::sites(); }
void inject(std::string site, std::string mutation) { emulator::inject(site, mutation); }
bool injected_ran() { return emulator::injected_ran(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(almostgpt_emulator, library) {
  library.def("configure(int seed, str asynchrony, bool check, int multiprocessors) -> ()");
  library.def("options() -> str");
  library.def("statistics() -> str");
  library.def("reset_statistics() -> ()");
  library.def("sites() -> str");
  library.def("inject(str site, str mutation) -> ()");
  library.def("injected_ran() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(almostgpt_emulator, CompositeExplicitAutograd, library) {
  library.impl("configure", TORCH_BOX(&configure));
  library.impl("options", TORCH_BOX(&options));
  library.impl("statistics", TORCH_BOX(&statistics));
  library.impl("reset_statistics", TORCH_BOX(&reset_statistics));
  library.impl("sites", TORCH_BOX(&sites));
  library.impl("inject", TORCH_BOX(&inject));
  library.impl("injected_ran", TORCH_BOX(&injected_ran));
}

}  // namespace almostgpt::binding
