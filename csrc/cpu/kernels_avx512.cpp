#include "cpu/lanes_avx512.h"
// after the lanes
#include "cpu/attention.inl"
#include "cpu/dots.inl"

namespace almostgpt::cpu {

extern const DotKernels kAvx512Dots = kDots;
extern const AttentionKernels kAvx512Attention = kAttention;

}  // namespace almostgpt::cpu
