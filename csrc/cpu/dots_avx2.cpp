#include "cpu/lanes_avx2.h"
#include "cpu/dots.inl"

namespace almostgpt::cpu {
extern const DotKernels kAvx2Dots = kDots;
}
