// The instruction sets that the kernels for a processor are compiled for, and which of them it has.
#pragma once

namespace almostgpt::cpu {

// In the order in which they are preferred, the best last. The numbers are those of kernels/cpu.py.
enum class InstructionSet : int {
  portable = 0,  // whatever the compiler makes of plain C++
  avx2 = 1,      // AVX2 and FMA: 8 floats
  avx512 = 2,    // AVX-512 F, BW, VL and VNNI: 16 floats, and integer dot products in one instruction
};
constexpr int kInstructionSets = 3;

// Whether this library was compiled for it and this processor runs it.
bool available(InstructionSet set);

// The best that is available. Asked once: the answer cannot change.
InstructionSet best_instruction_set();

const char* name_of(InstructionSet set);

}  // namespace almostgpt::cpu
