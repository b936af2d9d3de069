// Tensor cores and asynchronous copies as of sm_80: every lane of the warp calls, without divergence.
#pragma once

#include "device/cuda/core.cuh"

namespace almostgpt::device {

// --- tensor cores -----------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of a row: row l % 8 of matrix l / 8,
// 16 bytes each. Register j then holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix j.
// Source: PTX ISA, "ldmatrix".
DEVICE void ldmatrix_x4(uint32_t (&r)[4], shared_addr row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
// The same of the transposed matrices: rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], shared_addr row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

// d += A B with A 16x16, B 16x8 and d 16x8 in float32; T is bf16 or fp16, two to a register.
// With g = lane / 4 and t = lane % 4: a[i] holds A[g + 8 (i % 2)][2 t + 8 (i / 2) + {0, 1}],
// b0 B[2 t + {0, 1}][g], b1 B[2 t + 8 + {0, 1}][g], d[i] is D[g + 8 (i / 2)][2 t + i % 2].
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, fp16>);
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// --- asynchronous copies from global to shared memory ------------------------------------------------------

// 16 bytes, both addresses multiples of 16; where not `valid` nothing is read and zeros are written.
// The copy is this thread's: it ends with a cp_async_wait of this thread, after a cp_async_commit,
// and others see it after a barrier that follows.
template <class T> DEVICE void cp_async16(shared_addr to, Global<T> from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(to), "l"(detail::address_of(from)), "r"(valid ? 16 : 0) : "memory");
}
// The same of 4 bytes, both addresses multiples of 4.
template <class T> DEVICE void cp_async4(shared_addr to, Global<T> from, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               ::"r"(to), "l"(detail::address_of(from)), "r"(valid ? 4 : 0) : "memory");
}
// Makes a group of this thread's copies since the last one.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the N newest groups are still under way.
template <int N> DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

}  // namespace almostgpt::device
