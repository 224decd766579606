// The tensors of ascent_step_ as the CPU and the CUDA kernels read them.
#pragma once

#include <cstdint>

namespace zsu {

// x, grad and the moments share one layout, in which a row (one impression) is one block of memory.
struct AscentStepTensors {
  float* x;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  const int32_t* step; // steps taken before this one, per row
  const bool* active;
  const float* low;
  const float* high;
  const float* lr;
  const float* beta;
  int64_t rows, row_size;
  int64_t channels;  // x.shape[1], 1 if x has none
  int64_t bounds;    // numbers in low and in high: 1, or channels
  int64_t lr_stride; // 0: one for all rows
  bool channels_last;
};

} // namespace zsu
