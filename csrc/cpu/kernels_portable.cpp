#include "cpu/lanes_portable.h"
// after the lanes
#include "cpu/attention.inl"
#include "cpu/dots.inl"

namespace almostgpt::cpu {

extern const DotKernels kPortableDots = kDots;
extern const AttentionKernels kPortableAttention = kAttention;

}  // namespace almostgpt::cpu
