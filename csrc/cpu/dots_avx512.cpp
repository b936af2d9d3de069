#include "cpu/lanes_avx512.h"
#include "cpu/dots.inl"

namespace almostgpt::cpu {
extern const DotKernels kAvx512Dots = kDots;
}
