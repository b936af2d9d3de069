#include "cpu/lanes_avx2.h"
// after the lanes
#include "cpu/attention.inl"
#include "cpu/dots.inl"

namespace almostgpt::cpu {

extern const DotKernels kAvx2Dots = kDots;
extern const AttentionKernels kAvx2Attention = kAttention;

}  // namespace almostgpt::cpu
