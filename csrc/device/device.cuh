// The only interface between kernels and the machine: kernels include this file and nothing else.
//
// A kernel written in these names builds with nvcc for a GPU (device/cuda/, where all of the project's
// inline PTX is) and with g++ for a CPU (device/emulator/, which runs it thread by thread and checks it).
// Both sides offer the same names and signatures; this is the list.
//
//   KERNEL name(GRID_CONSTANT const Args args)     an entry point; LAUNCH_BOUNDS(threads, blocks) after KERNEL
//   DEVICE, HOST_DEVICE                            a function that kernels call
//   UNROLL, UNROLL_BY(n)                           before a for loop
//
//   types       bf16 fp16 u32x2 u32x4 f32x4 shared_addr Global<T> Cache SwizzleSpan TensorMap   (types.h)
//   where am I  thread_id lane_id warp_id block_size block_x block_y block_z grid_x grid_y grid_z
//   barriers    cta_sync bar_sync bar_arrive warp_sync
//   warp        shfl_xor shfl_down shfl_up shfl_idx ballot
//   shared      shared_base load_shared<V> store_shared<V>
//   global      load_global load_global_as<V> store_global store_global_as<V>
//   between     fence_gpu load_relaxed store_relaxed load_acquire store_release
//   blocks      atomic_add atomic_add_acq_rel reduce_add reduce_add_f32x4
//   maths       exp2_approx log2_approx rcp_approx rsqrt_approx tanh_approx max min
//   16 bits     to_float to_bf16 to_fp16 pack_bf16 unpack_bf16_lo/hi pack_fp16 unpack_fp16_lo/hi pair_of_int8<T, i, j>
//   sm_80       ldmatrix_x4 ldmatrix_x4_trans mma_m16n8k16<T>
//               cp_async16 cp_async4 cp_async_commit cp_async_wait<N>
//   sm_90       elect_one mbar_init mbar_arrive mbar_arrive_expect_tx mbar_try_wait mbar_wait
//               fence_mbarrier_init fence_proxy_async prefetch_tensor_map
//               tma_load tma_store tma_reduce_add bulk_reduce_add_f32 tma_commit tma_wait<N> tma_wait_read<N>
//               wgmma_fence wgmma_commit wgmma_wait<N> wgmma_ss wgmma_rs keep_registers matrix_descriptor advanced
//               setmaxnreg_inc<N> setmaxnreg_dec<N>
//   host        launch<kernel>(shape, stream, args…) LaunchShape Card current_card make_tensor_map error_string
//
// What each of them does is said where it is defined, in device/cuda/; the order, and so the reading
// order, is the same there. device/vector.cuh and device/collectives.cuh build on them.
#pragma once

#if defined(ALMOSTGPT_EMULATOR)
#include "device/emulator/primitives.h"
#else
#include "device/cuda/core.cuh"
#include "device/cuda/sm80.cuh"
#include "device/cuda/sm90.cuh"
#endif

#include "device/collectives.cuh"
#include "device/vector.cuh"
