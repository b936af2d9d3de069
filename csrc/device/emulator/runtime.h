// What the primitives call. Those that only pass on their arguments are described in device/cuda/.
#pragma once

#include <functional>

#include "device/emulator/location.h"
#include "device/emulator/report.h"
#include "device/emulator/tensor_map.h"
#include "device/emulator/host_device.h"
#include "device/types.h"

namespace almostgpt::emulator {

struct Thread;
struct Warp;
struct Block;

// What kernels ask of the running thread, in one place.
struct Where {
  int thread, lane, warp, block_size;
  device::Dim3 block, grid;
};
extern Where where;

// --- host (launch.cpp, card.cpp) ----------------------------------------------------------------------------

// Runs the kernel to its end; `thread_body` is what a thread does, `described` __PRETTY_FUNCTION__ of the
// function template that has the kernel as its argument named `kernel`. Returns 0, or throws Error.
int run_kernel(const char* described, const device::LaunchShape& shape, const std::function<void()>& thread_body);
// With the number of multiprocessors that the options ask for. Throws Error("session") outside of one.
device::Card session_card();

// --- warps (warp.cpp) ---------------------------------------------------------------------------------------

// Every lane of the mask calls with its own arguments; the last to come runs `together` with all of them
// (null for the others' lanes), and everybody goes on. Memory is not ordered.
using Together = void (*)(void** arguments, uint32_t mask, Location at);
void collective(const char* name, void* arguments, uint32_t mask, Together together, Location at);
void warp_sync(uint32_t mask, Location at);

// --- barriers (barrier.cpp) -----------------------------------------------------------------------------------

void cta_sync(Location at);
void bar_sync(int barrier, int threads, Location at);
void bar_arrive(int barrier, int threads, Location at);

// --- shared memory (shared_memory.cpp) ------------------------------------------------------------------------

// Where it begins: not at 0, so that a forgotten shared_base() is noticed.
constexpr uint32_t kSharedBase = 1024;

void load_shared(device::shared_addr from, void* to, uint32_t bytes, Location at);
void store_shared(device::shared_addr to, const void* from, uint32_t bytes, Location at);
// 16 bytes on behalf of four lanes, as ldmatrix reads a row: word w for the lane first + step w.
void load_matrix_row(device::shared_addr from, uint16_t (&row)[8], bool transposed, int row_number, Location at);
void count_matrix_rows(const uint32_t (&addresses)[8]);

// --- global memory (global_memory.cpp) --------------------------------------------------------------------------

void load_global(const void* from, void* to, uint32_t bytes, bool read_only, Location at);
void store_global(void* to, const void* from, uint32_t bytes, Location at);
void fence_gpu(Location at);
uint32_t load_strong(const void* from, bool acquire, Location at);
void store_strong(void* to, uint32_t value, bool release, Location at);
float atomic_add(float* to, float value, Location at);
uint32_t atomic_add(uint32_t* to, uint32_t value, bool acquire_release, Location at);
void check_alignment(const void* address, uint32_t bytes, const char* what, Location at);

// --- cp.async (cp_async.cpp) ------------------------------------------------------------------------------------

void cp_async(device::shared_addr to, const void* from, uint32_t size, bool valid, Location at);
void cp_async_commit(Location at);
void cp_async_wait(int newest, Location at);

// --- mbarriers (mbarrier.cpp) -------------------------------------------------------------------------------------

void require_sm90(const char* primitive, Location at);
void mbar_init(device::shared_addr barrier, uint32_t arrivals, Location at);
void mbar_arrive(device::shared_addr barrier, Location at);
void mbar_arrive_expect_tx(device::shared_addr barrier, uint32_t bytes, Location at);
bool mbar_try_wait(device::shared_addr barrier, uint32_t parity, Location at);
void mbar_wait(device::shared_addr barrier, uint32_t parity, Location at);
void fence_mbarrier_init(Location at);
void fence_proxy_async(Location at);

// --- TMA (tma.cpp) --------------------------------------------------------------------------------------------------

void prefetch_tensor_map(const TensorMap* map, Location at);
void tma_load(device::shared_addr to, const TensorMap* map, device::shared_addr barrier, const int* coordinates,
              int rank, Location at);
void tma_store(const TensorMap* map, device::shared_addr from, const int* coordinates, int rank, bool add, Location at);
void bulk_reduce_add_f32(float* to, device::shared_addr from, uint32_t bytes, Location at);
void tma_commit(Location at);
void tma_wait(int newest, Location at);
void tma_wait_read(int newest, Location at);
// Pending load number `index` happens now.
void complete_tma_load(size_t index);

// --- wgmma (wgmma.cpp) ------------------------------------------------------------------------------------------------

struct WgmmaArguments {
  float* d;
  const uint32_t* a_registers;  // null: a is a descriptor
  uint64_t a, b;
  int n;
  bool accumulate, a_mn_major, b_mn_major, is_fp16;
};
void wgmma(WgmmaArguments arguments, Location at);
void wgmma_fence(Location at);
void wgmma_commit(Location at);
void wgmma_wait(int newest, Location at);

// --- registers (registers.cpp) --------------------------------------------------------------------------------------

void setmaxnreg(int count, bool increase, Location at);

// --- the end of a thread, or of a block: each checks that nothing is left undone (exit.cpp calls the others) ---------------

void thread_exits(Thread& thread);
void stores_at_exit(Thread& thread);
void wgmma_at_exit(Warp& warp);
void registers_at_exit(Warp& warp);
void barriers_at_exit(const Block& block);

}  // namespace almostgpt::emulator
