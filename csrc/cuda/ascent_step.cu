#include "common.cuh"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace zsu::cuda {
namespace {

struct Ratio {
  __host__ __device__ float operator()(float a, float b, float eps) const { return a / (sqrtf(b) + eps); }
};

struct Args {
  float* x;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  const int32_t* step;
  const bool* active;
  const float *low, *high, *lr, *beta;
  int64_t rows, row_size, channels, plane, lr_stride;
  bool per_channel, channels_last, packed;
  float beta1, beta2, gain1, gain2, log_beta1, log_beta2, eps;
};

constexpr int threads = 256;

// A thread takes the elements of one aligned group of 4 (in memory) that belong to its row, so rows
// of any length move by 128 bits except at their ends.
__global__ void __launch_bounds__(threads) ascent_step_kernel(Args a, int64_t blocks_per_row) {
  const int64_t row_index = blockIdx.x / blocks_per_row;
  if (!a.active[row_index]) return;
  const int64_t begin = row_index * a.row_size, end = begin + a.row_size;
  const int64_t group = begin / 4 + (blockIdx.x % blocks_per_row) * threads + threadIdx.x;
  const int64_t first = max(begin, group * 4), last = min(end, group * 4 + 4);
  if (first >= last) return;

  const int32_t step = a.step[row_index] + 1;
  AscentRow row;
  row.lr = a.lr[row_index * a.lr_stride];
  row.two_beta = 2 * *a.beta;
  row.beta1 = a.beta1;
  row.beta2 = a.beta2;
  row.gain1 = a.gain1;
  row.gain2 = a.gain2;
  const float root_correction2 = sqrtf(-expm1f(static_cast<float>(step) * a.log_beta2));
  row.unbias = root_correction2 / -expm1f(static_cast<float>(step) * a.log_beta1); // 1 - b^t loses digits
  row.eps = a.eps * root_correction2;

  const bool whole = a.packed && last - first == 4;
  Pack<float> x, g, m, v;
  if (whole) {
    x = load_pack(a.x + first);
    g = load_pack(a.grad + first);
    m = load_pack(a.exp_avg + first);
    v = load_pack(a.exp_avg_sq + first);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (first + k >= last) continue;
      x.v[k] = a.x[first + k];
      g.v[k] = a.grad[first + k];
      m.v[k] = a.exp_avg[first + k];
      v.v[k] = a.exp_avg_sq[first + k];
    }
  }
  int64_t channel = 0, next_plane = 0; // one division a thread: they cost as much as the step
  if (a.per_channel) {
    channel = a.channels_last ? (first - begin) % a.channels : (first - begin) / a.plane;
    next_plane = (channel + 1) * a.plane;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (first + k >= last) continue;
    const int64_t i = first + k - begin;
    if (a.per_channel && k > 0) {
      if (a.channels_last) {
        if (++channel == a.channels) channel = 0;
      } else if (i == next_plane) {
        ++channel;
        next_plane += a.plane;
      }
    }
    const float moved = x.v[k] + row.lr * ascent_direction(x.v[k], g.v[k], m.v[k], v.v[k], row, Ratio{});
    x.v[k] = clamp_seeing_nan(moved, a.low[channel], a.high[channel]);
  }
  if (whole) {
    store_pack(a.x + first, x);
    store_pack(a.exp_avg + first, m);
    store_pack(a.exp_avg_sq + first, v);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (first + k >= last) continue;
      a.x[first + k] = x.v[k];
      a.exp_avg[first + k] = m.v[k];
      a.exp_avg_sq[first + k] = v.v[k];
    }
  }
}

// After every block has read the old count, hence a kernel of its own.
__global__ void count_step_kernel(int32_t* step, const bool* active, int64_t rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < rows && active[i]) step[i] += 1;
}

void ascent_step_(
    const Tensor& x, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step,
    const Tensor& active, const Tensor& low, const Tensor& high, const Tensor& lr, const Tensor& beta,
    double beta1, double beta2, double eps) {
  const AscentLayout layout = check_ascent_step(x, grad, exp_avg, exp_avg_sq, step, active, low, high, lr, beta);
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  Args a{};
  a.x = x.mutable_data_ptr<float>();
  a.grad = grad.const_data_ptr<float>();
  a.exp_avg = exp_avg.mutable_data_ptr<float>();
  a.exp_avg_sq = exp_avg_sq.mutable_data_ptr<float>();
  a.step = step.const_data_ptr<int32_t>();
  a.active = active.const_data_ptr<bool>();
  a.low = low.const_data_ptr<float>();
  a.high = high.const_data_ptr<float>();
  a.lr = lr.const_data_ptr<float>();
  a.beta = beta.const_data_ptr<float>();
  a.rows = layout.rows;
  a.row_size = layout.row_size;
  a.channels = layout.channels;
  a.plane = layout.row_size / layout.channels;
  a.lr_stride = lr.numel() > 1 ? 1 : 0;
  a.per_channel = layout.bounds > 1;
  a.channels_last = layout.channels_last;
  const auto aligned = [](const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; };
  a.packed = aligned(a.x) && aligned(a.grad) && aligned(a.exp_avg) && aligned(a.exp_avg_sq);
  a.beta1 = static_cast<float>(beta1);
  a.beta2 = static_cast<float>(beta2);
  a.gain1 = static_cast<float>(1 - beta1);
  a.gain2 = static_cast<float>(1 - beta2);
  a.log_beta1 = static_cast<float>(std::log(beta1));
  a.log_beta2 = static_cast<float>(std::log(beta2));
  a.eps = static_cast<float>(eps);

  const int64_t groups = layout.row_size / 4 + 2; // a row that starts off a group touches one more
  const int64_t blocks_per_row = (groups + threads - 1) / threads;
  ascent_step_kernel<<<static_cast<unsigned>(layout.rows * blocks_per_row), threads, 0, stream>>>(a, blocks_per_row);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  count_step_kernel<<<static_cast<unsigned>((layout.rows + 255) / 256), 256, 0, stream>>>(
      step.mutable_data_ptr<int32_t>(), active.const_data_ptr<bool>(), layout.rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace
} // namespace zsu::cuda

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CUDA, m) {
  m.impl("ascent_step_", TORCH_BOX(&zsu::cuda::ascent_step_));
}
