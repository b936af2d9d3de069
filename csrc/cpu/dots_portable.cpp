#include "cpu/lanes_portable.h"
#include "cpu/dots.inl"

namespace almostgpt::cpu {
extern const DotKernels kPortableDots = kDots;
}
