// Runs CUDA kernels on the CPU, a block at a time: each thread is a fiber, which yields where it waits for
// others. Included before the sources of csrc/cuda, which g++ compiles as C++; stands in for launch.cuh.
//
// Blocks run their threads forwards and backwards in turn, so that a missing barrier shows; a barrier that
// not all threads reach ends the process. What it does not show: 128-bit alignment of loads, the hardware's
// approximations, and speed.
#pragma once

#include "../../../csrc/refusal.h" // before torch's headers

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#define ZSU_CUDA_IMPL STABLE_TORCH_LIBRARY_IMPL(zsu_emulated, CPU, m)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Fiber {
  static constexpr size_t stack_size = 128 * 1024;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_size]};
  bool done = false;
};
struct Lane {
  unsigned waits_for = 0, released = 0;
  alignas(8) char value[8];
};

inline std::vector<Fiber> fibers;
inline std::vector<Lane> lanes;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned arrived, released, events; // at the block's barrier; events: any progress

inline void yield() {
  const unsigned me = threadIdx.x;
  swapcontext(&fibers[me].context, &scheduler);
  threadIdx.x = me;
}

inline void enter() {
  body();
  fibers[threadIdx.x].done = true;
  ++events;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

inline void sync_lanes(unsigned mask) {
  Lane* warp = &lanes[threadIdx.x / 32 * 32];
  const unsigned lane = threadIdx.x % 32;
  warp[lane].waits_for = mask;
  bool all = true;
  for (unsigned l = 0; l < 32; ++l) all &= !(mask >> l & 1) || warp[l].waits_for == mask;
  const unsigned before = warp[lane].released;
  if (all) {
    ++events;
    for (unsigned l = 0; l < 32; ++l)
      if (mask >> l & 1) warp[l].waits_for = 0, ++warp[l].released;
  }
  while (warp[lane].released == before) yield();
}

inline void run_block(int64_t threads) {
  if (fibers.size() < static_cast<size_t>(threads)) fibers = std::vector<Fiber>(static_cast<size_t>(threads));
  lanes.assign(static_cast<size_t>(threads + 31), Lane{});
  arrived = 0;
  for (int64_t t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[static_cast<size_t>(t)];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::stack_size;
    fiber.context.uc_link = nullptr;
    fiber.done = false;
    makecontext(&fiber.context, enter, 0);
  }
  for (int64_t left = threads; left > 0;) {
    const unsigned before = events;
    left = 0;
    for (int64_t n = 0; n < threads; ++n) {
      const int64_t t = blockIdx.x % 2 ? threads - 1 - n : n;
      if (fibers[static_cast<size_t>(t)].done) continue;
      threadIdx.x = static_cast<unsigned>(t);
      swapcontext(&scheduler, &fibers[static_cast<size_t>(t)].context);
      left += !fibers[static_cast<size_t>(t)].done;
    }
    if (left > 0 && events == before) {
      std::fprintf(stderr, "a barrier waits for threads that never reach it\n");
      std::abort();
    }
  }
}

} // namespace emulator

inline void __syncthreads() {
  const unsigned before = emulator::released;
  if (++emulator::arrived == blockDim.x) {
    emulator::arrived = 0;
    ++emulator::released;
    ++emulator::events;
  }
  while (emulator::released == before) emulator::yield();
}
inline void __syncwarp(unsigned mask) { emulator::sync_lanes(mask); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
  emulator::Lane* warp = &emulator::lanes[threadIdx.x / 32 * 32];
  const unsigned lane = threadIdx.x % 32, from = lane ^ static_cast<unsigned>(by);
  if (!(mask >> from & 1)) std::abort();
  std::memcpy(warp[lane].value, &value, sizeof(T));
  emulator::sync_lanes(mask);
  std::memcpy(&value, warp[from].value, sizeof(T));
  emulator::sync_lanes(mask); // before the next value is written
  return value;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return by ? low >> by | high << (32 - by) : low;
}

namespace zsu::cuda {

using std::exp;
using std::log;
using std::max;
using std::min;

struct Stream {
  explicit Stream(const torch::stable::Tensor&) {}
};

// Few blocks, so that each takes its turn with several rows.
template <class Kernel>
int64_t resident_blocks(Kernel, int, int64_t wanted) {
  return std::min<int64_t>(wanted, 3);
}

template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const Stream&, Args... args) {
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  emulator::body = [=] { kernel(args...); };
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    emulator::run_block(threads);
  }
}

} // namespace zsu::cuda
