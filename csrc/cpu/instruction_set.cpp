#include "cpu/instruction_set.h"

namespace almostgpt::cpu {

bool available(InstructionSet set) {
  switch (set) {
    case InstructionSet::portable: return true;
#if defined(ALMOSTGPT_X86_64)
    case InstructionSet::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case InstructionSet::avx512:
      return available(InstructionSet::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
    default: return false;
  }
}

InstructionSet best_instruction_set() {
  static const InstructionSet best = [] {
    int set = kInstructionSets - 1;
    while (!available(static_cast<InstructionSet>(set))) --set;
    return static_cast<InstructionSet>(set);
  }();
  return best;
}

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx2: return "avx2";
    case InstructionSet::avx512: return "avx512";
    default: return "portable";
  }
}

}  // namespace almostgpt::cpu
