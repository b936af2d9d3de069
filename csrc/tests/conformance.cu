// Does every primitive of device.cuh do what it says? One program for both of its sides:
//
//   nvcc -std=c++17 -O3 -I csrc -arch=sm_80 csrc/tests/conformance.cu -o conformance
//   nvcc -std=c++17 -O3 -I csrc -gencode arch=compute_90a,code=sm_90a csrc/tests/conformance*.cu -o conformance
//   g++ -std=c++17 -O2 -DALMOSTGPT_EMULATOR -I csrc -x c++ csrc/tests/conformance*.cu
//       csrc/device/emulator/*.cpp -o conformance
//
// Each case launches small kernels and checks all that they return against an independent computation,
// mostly of whole numbers, which are exact. --dump keeps what the machine returned, and --golden compares
// with what another returned: the emulator against a GPU.
#include "tests/conformance.h"

#include "tests/conformance_maths.cuh"
#include "tests/conformance_memory.cuh"
#include "tests/conformance_sm80.cuh"
#include "tests/conformance_threads.cuh"

#include <map>

namespace almostgpt::conformance {
namespace {

struct Arguments {
  bool list = false, primitives = false;
  std::string only, dump, golden;
  int major = 9, minor = 0;  // of the card that the emulator plays
};

constexpr char kUsage[] =
    "usage: conformance [--list] [--primitives] [--only NAME] [--dump DIR] [--golden DIR] [--card 8.0]\n"
    "  --list        the names of the cases\n"
    "  --primitives  each primitive and the cases that cover it\n"
    "  --only NAME   runs that case alone\n"
    "  --dump DIR    writes what each case read back to DIR/NAME.bin, little-endian\n"
    "  --golden DIR  compares it with DIR/NAME.bin: to the bit, approximate results within twice their bound\n"
    "  --card M.N    the card that the emulator plays; default 9.0\n";

[[noreturn]] void refuse(const std::string& message) {
  fprintf(stderr, "conformance: %s\n%s", message.c_str(), kUsage);
  std::exit(2);
}

Arguments parse(int count, char** values) {
  Arguments arguments;
  for (int i = 1; i < count; ++i) {
    const std::string name = values[i];
    const auto value = [&] {
      if (i + 1 == count) refuse(name + " needs a value");
      return std::string(values[++i]);
    };
    if (name == "--list") arguments.list = true;
    else if (name == "--primitives") arguments.primitives = true;
    else if (name == "--only") arguments.only = value();
    else if (name == "--dump") arguments.dump = value();
    else if (name == "--golden") arguments.golden = value();
    else if (name == "--card") {
      if (sscanf(value().c_str(), "%d.%d", &arguments.major, &arguments.minor) != 2) refuse("a card is like 8.0");
    } else refuse("unknown option " + name);
  }
  return arguments;
}

void print_primitives() {
  std::map<std::string, std::string> covered_by;
  for (const Case& one : cases()) {
    size_t begin = 0;
    while (begin < one.primitives.size()) {
      const size_t end = std::min(one.primitives.find(' ', begin), one.primitives.size());
      covered_by[one.primitives.substr(begin, end - begin)] += " " + one.name;
      begin = end + 1;
    }
  }
  for (const auto& [primitive, names] : covered_by) printf("%s%s\n", primitive.c_str(), names.c_str());
}

struct CloseFile { void operator()(FILE* file) const { fclose(file); } };
using File = std::unique_ptr<FILE, CloseFile>;

void dump(const Run& run, const std::string& path) {
  const File file(fopen(path.c_str(), "wb"));
  require(file != nullptr, "cannot write " + path);
  for (const Record& record : run.records())
    require(fwrite(record.bytes.data(), 1, record.bytes.size(), file.get()) == record.bytes.size(),
            "cannot write " + path);
}

// Both results may be as far off as the bound allows, so they may be twice that apart.
bool agree(const Record& record, size_t at, const unsigned char* golden) {
  if (!record.approximate) return record.bytes[at] == golden[at];
  float a, b;
  memcpy(&a, &record.bytes[at / 4 * 4], 4);
  memcpy(&b, &golden[at / 4 * 4], 4);
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(double(a) - b) <= 2 * (record.bound.relative * std::fabs(b) + record.bound.absolute);
}

// False where there is no file to compare with.
bool compare(Run& run, const std::string& path) {
  const File file(fopen(path.c_str(), "rb"));
  if (file == nullptr) return false;
  for (size_t index = 0; index < run.records().size(); ++index) {
    const Record& record = run.records()[index];
    std::vector<unsigned char> golden(record.bytes.size());
    require(fread(golden.data(), 1, golden.size(), file.get()) == golden.size(), path + " is too short");
    size_t at = 0;
    while (at < golden.size() && agree(record, at, golden.data())) ++at;
    if (at == golden.size()) continue;
    const size_t word = at / 4 * 4, n = std::min<size_t>(4, golden.size() - word);
    uint32_t got = 0, want = 0;
    memcpy(&got, &record.bytes[word], n);
    memcpy(&want, &golden[word], n);
    char line[120];
    snprintf(line, sizeof line, "record %zu, byte %zu: 0x%08x, golden 0x%08x", index, word, got, want);
    run.fail(line);
  }
  require(fgetc(file.get()) == EOF, path + " is too long");
  return true;
}

bool run_case(const Case& one, const Arguments& arguments) {
  std::vector<std::string> failures;
  bool missing = false;
  try {
    Run run(arguments.major, arguments.minor);
    if (one.major == 9 && (run.card().major != 9 || run.card().minor != 0)) {
      printf("skipped %s: it needs a card of compute capability 9.0\n", one.name.c_str());
      return true;
    }
    try {
      one.body(run);
      if (!arguments.golden.empty()) missing = !compare(run, arguments.golden + "/" + one.name + ".bin");
    } catch (const std::exception& error) {
      run.fail(error.what());
    }
    failures = run.failures();
    // Wrong results, too: they are what one wants to look at.
    if (!arguments.dump.empty()) dump(run, arguments.dump + "/" + one.name + ".bin");
  } catch (const std::exception& error) {
    failures.push_back(error.what());
  }
  if (failures.empty()) {
    printf("ok %s%s\n", one.name.c_str(), missing ? " (no golden file)" : "");
    return true;
  }
  printf("FAIL %s:", one.name.c_str());
  for (const std::string& failure : failures) printf(" %s;", failure.c_str());
  printf("\n");
  return false;
}

int conform(int count, char** values) {
  const Arguments arguments = parse(count, values);
  if (arguments.primitives) return print_primitives(), 0;
  bool found = false, good = true;
  for (const Case& one : cases()) {
    if (!arguments.only.empty() && one.name != arguments.only) continue;
    found = true;
    if (arguments.list) printf("%s\n", one.name.c_str());
    else good &= run_case(one, arguments);
    fflush(stdout);
  }
  if (!found) refuse("no case named " + arguments.only);
  return good ? 0 : 1;
}

}  // namespace
}  // namespace almostgpt::conformance

int main(int count, char** values) { return almostgpt::conformance::conform(count, values); }
