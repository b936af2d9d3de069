// torch.ops.almostgpt.build_info() -> str: how this library was built, as JSON. CMake defines
// ALMOSTGPT_PLAN (what is built and why) and ALMOSTGPT_COMPILER, and where it builds for CUDA
// ALMOSTGPT_CUDA_VERSION and ALMOSTGPT_CUDA_ARCHS (separated by commas).

#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

namespace almostgpt::binding {
namespace {

std::string quoted(const std::string& text) { return '"' + text + '"'; }

std::string archs() {
  std::string list = "[";
#ifdef ALMOSTGPT_CUDA_ARCHS
  list += '"';
  for (const char letter : std::string(ALMOSTGPT_CUDA_ARCHS)) {
    if (letter == ',') list += "\", \"";
    else list += letter;
  }
  list += '"';
#endif
  return list + "]";
}

std::string build_info() {
#ifdef ALMOSTGPT_CUDA_VERSION
  const std::string cuda = quoted(ALMOSTGPT_CUDA_VERSION);
#else
  const std::string cuda = "null";
#endif
  return "{\"cuda\": " + cuda + ", \"archs\": " + archs() +
         ", \"torch\": " + quoted(TORCH_VERSION) + ", \"compiler\": " +
         quoted(ALMOSTGPT_COMPILER) + ", \"plan\": " + quoted(ALMOSTGPT_PLAN) + "}";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(almostgpt, library) { library.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(almostgpt, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&build_info));
}

}  // namespace almostgpt::binding
