#include "../checks.h"
#include "device.cuh"
#include "launch.cuh"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace zsu::cuda {
namespace {

constexpr int threads = 256;

struct Ratio {
  __host__ __device__ float operator()(float a, float b, float eps) const { return a / (sqrtf(b) + eps); }
};

// The arguments of a call in the form in which a thread reads them.
struct AscentStepArgs : AscentStepTensors {
  int64_t plane; // elements per channel
  bool packed;   // all four arrays start at 16-byte boundaries
  float beta1, beta2, gain1, gain2, log_beta1, log_beta2, eps;
};

// Four neighbouring elements of x, grad and the moments.
struct Group {
  float x[4], grad[4], exp_avg[4], exp_avg_sq[4];
};

// Loads elements [first, last) of a group, by 128 bits per array if `whole`.
__device__ Group load_group(const AscentStepArgs& a, int64_t first, int64_t last, bool whole) {
  Group g;
  if (whole) {
    const Raw<float, 4> x = load_raw<4>(a.x + first), grad = load_raw<4>(a.grad + first);
    const Raw<float, 4> exp_avg = load_raw<4>(a.exp_avg + first), exp_avg_sq = load_raw<4>(a.exp_avg_sq + first);
    unpack(x, g.x);
    unpack(grad, g.grad);
    unpack(exp_avg, g.exp_avg);
    unpack(exp_avg_sq, g.exp_avg_sq);
    return g;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (first + k >= last) continue;
    g.x[k] = a.x[first + k];
    g.grad[k] = a.grad[first + k];
    g.exp_avg[k] = a.exp_avg[first + k];
    g.exp_avg_sq[k] = a.exp_avg_sq[first + k];
  }
  return g;
}

__device__ void store_group(const AscentStepArgs& a, int64_t first, int64_t last, bool whole, const Group& g) {
  if (whole) {
    store_raw<4>(a.x + first, pack<float>(g.x));
    store_raw<4>(a.exp_avg + first, pack<float>(g.exp_avg));
    store_raw<4>(a.exp_avg_sq + first, pack<float>(g.exp_avg_sq));
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (first + k >= last) continue;
    a.x[first + k] = g.x[k];
    a.exp_avg[first + k] = g.exp_avg[k];
    a.exp_avg_sq[first + k] = g.exp_avg_sq[k];
  }
}

__device__ AscentRow ascent_row(const AscentStepArgs& a, int64_t index) {
  const int32_t step = a.step[index] + 1;
  AscentRow row;
  row.lr = a.lr[index * a.lr_stride];
  row.two_beta = 2 * *a.beta;
  row.beta1 = a.beta1;
  row.beta2 = a.beta2;
  row.gain1 = a.gain1;
  row.gain2 = a.gain2;
  // 1 - b^t loses digits; expm1 keeps them
  const float root_correction2 = sqrtf(-expm1f(static_cast<float>(step) * a.log_beta2));
  row.unbias = root_correction2 / -expm1f(static_cast<float>(step) * a.log_beta1);
  row.eps = a.eps * root_correction2;
  return row;
}

// A thread steps those elements of one aligned group of 4 that belong to its row, so rows of any length
// move by 128 bits except at their ends.
__global__ void __launch_bounds__(threads) ascent_step_kernel(AscentStepArgs a, int64_t blocks_per_row) {
  const int64_t index = blockIdx.x / blocks_per_row;
  if (!a.active[index]) return;
  const int64_t begin = index * a.row_size, end = begin + a.row_size;
  const int64_t group = begin / 4 + (blockIdx.x % blocks_per_row) * threads + threadIdx.x;
  const int64_t first = max(begin, group * 4), last = min(end, group * 4 + 4);
  if (first >= last) return;

  const AscentRow row = ascent_row(a, index);
  const bool whole = a.packed && last - first == 4;
  Group g = load_group(a, first, last, whole);
  const bool per_channel = a.bounds > 1;
  int64_t channel = 0, next_plane = 0; // one division per thread: a division costs as much as a step
  if (per_channel) {
    channel = a.channels_last ? (first - begin) % a.channels : (first - begin) / a.plane;
    next_plane = (channel + 1) * a.plane;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (first + k >= last) continue;
    if (per_channel && k > 0) {
      if (a.channels_last) {
        if (++channel == a.channels) channel = 0;
      } else if (first + k - begin == next_plane) {
        ++channel;
        next_plane += a.plane;
      }
    }
    const float moved =
        g.x[k] + row.lr * ascent_direction(g.x[k], g.grad[k], g.exp_avg[k], g.exp_avg_sq[k], row, Ratio{});
    g.x[k] = clamp_keeping_nan(moved, a.low[channel], a.high[channel]);
  }
  store_group(a, first, last, whole, g);
}

// A kernel of its own: it must run after every block has read the old count.
__global__ void count_step_kernel(int32_t* step, const bool* active, int64_t rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < rows && active[i]) step[i] += 1;
}

void ascent_step_(
    const Tensor& x, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step,
    const Tensor& active, const Tensor& low, const Tensor& high, const Tensor& lr, const Tensor& beta,
    double beta1, double beta2, double eps) {
  AscentStepArgs a{ascent_step_tensors(x, grad, exp_avg, exp_avg_sq, step, active, low, high, lr, beta)};
  if (a.rows == 0) return;
  const Stream stream(x);
  const auto aligned = [](const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; };
  a.plane = a.channels > 0 ? a.row_size / a.channels : 0;
  a.packed = aligned(a.x) && aligned(a.grad) && aligned(a.exp_avg) && aligned(a.exp_avg_sq);
  a.beta1 = static_cast<float>(beta1);
  a.beta2 = static_cast<float>(beta2);
  a.gain1 = static_cast<float>(1 - beta1);
  a.gain2 = static_cast<float>(1 - beta2);
  a.log_beta1 = static_cast<float>(std::log(beta1));
  a.log_beta2 = static_cast<float>(std::log(beta2));
  a.eps = static_cast<float>(eps);

  const int64_t groups = a.row_size / 4 + 2; // a misaligned row touches one group more
  const int64_t blocks_per_row = (groups + threads - 1) / threads;
  if (a.row_size > 0) launch(ascent_step_kernel, a.rows * blocks_per_row, threads, stream, a, blocks_per_row);
  launch(count_step_kernel, (a.rows + 255) / 256, 256, stream, step.mutable_data_ptr<int32_t>(), a.active, a.rows);
}

} // namespace
} // namespace zsu::cuda

ZSU_CUDA_IMPL {
  m.impl("ascent_step_", TORCH_BOX(&zsu::cuda::ascent_step_));
}
