// The CPU kernels of one instruction set: their arguments and a table of them. The set is chosen once, at
// run time.
#pragma once

#include "../ascent_step.h"

#include <cstdint>

// Only GCC compiles one file for another instruction set by pragma; elsewhere the baseline runs, which
// on aarch64 is NEON.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ZSU_HAS_ISA_LEVELS
#endif

namespace zsu {

enum class Storage : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

struct SignedCrossEntropyArgs {
  const void* logits; // [rows, classes], rows logits_stride apart
  int64_t logits_stride;
  void* dlogits; // rows dlogits_stride apart
  int64_t dlogits_stride;
  int64_t classes;
  const int64_t* target;
  const void* coef; // float; double if the storage is float64
  double* row_loss; // coef * loss; 0 on entry
};

struct MaskedCrossEntropyArgs {
  const void* logits;
  int64_t logits_stride;
  const void* teacher; // of the storage of logits, or of the type of coef
  int64_t teacher_stride;
  const int64_t* index; // row of the teacher for each row of logits; null: the same
  const bool* forget;
  void* dlogits; // contiguous
  int64_t classes;
  const void* coef;
  const void* keep; // of the type of coef; null: 0
  double shift;
  bool forget_only;
  double* row_loss;
};

struct ScaleRowsArgs {
  void* rows; // contiguous classes
  int64_t stride;
  int64_t classes;
  const void* coef;
  double factor[2]; // for negative and for other coefficients
};

struct AscentStepArgs : AscentStepTensors {
  double beta1, beta2, eps;
};

struct WinogradConvArgs {
  const float* x;      // [images, height, width, inputs]
  const float* weight; // [36, blocks, inputs, block], transformed
  const float* bias;   // [outputs]; null: 0
  const float* other;  // as out, added ahead of the bounds; null: 0
  float* out;          // [images, out_height, out_width, outputs]
  int64_t height, width, inputs;
  int64_t out_height, out_width, outputs;
  int64_t padding;
  int64_t blocks, block;
  int64_t tile_rows, tile_columns; // of an image
  int64_t tiles;                   // of all images
  int64_t chunk;                   // tiles that are computed at once
  float low, high;                 // bounds of the output
};

struct MaxPoolArgs {
  const void* from; // [images, height, width, channels]; of the backward pass as `to` of the forward pass
  void* to;         // [images, out_height, out_width, channels]; of the backward pass as `from` of the forward pass
  uint8_t* place;   // of the largest value in its window, row by row; no_place where relu cuts it off
  int64_t channels, height, width, out_height, out_width;
  int64_t kernel, stride, padding;
  bool relu;
};
constexpr int32_t no_place = 255;

struct ConvInputGradientArgs {
  const float* grad;   // [images, out_height, out_width, outputs]
  const float* weight; // [kernel_height, kernel_width, inputs, outputs]
  float* to;           // [images, height, width, inputs]
  int64_t kernel_height, kernel_width, inputs, outputs;
  int64_t stride, top, left; // top, left: padding
  int64_t height, width, out_height, out_width;
};

struct BlockedConvArgs {
  const float* x;      // [blocks, inputs, height, width, 16 images]
  const float* weight; // [inputs, kernel_height, kernel_width, outputs]
  const float* bias;   // [outputs]; null: 0
  float* out;          // [blocks, outputs, out_height, out_width, 16 images]
  int64_t inputs, height, width, outputs, out_height, out_width;
  int64_t kernel_height, kernel_width, top, left; // top, left: padding
};

// Each kernel runs rows [begin, end), or chunks of tiles. The losses and scale_rows_ have one kernel per Storage; the
// masked loss also has one for bfloat16 and float16 with a teacher in float, in this order. Pooling has one for float32
// and one for bfloat16.
struct Kernels {
  const char* name;
  void (*signed_cross_entropy[4])(const SignedCrossEntropyArgs&, int64_t begin, int64_t end);
  void (*masked_cross_entropy[6])(const MaskedCrossEntropyArgs&, int64_t begin, int64_t end);
  void (*scale_rows[4])(const ScaleRowsArgs&, int64_t begin, int64_t end);
  void (*ascent_step)(const AscentStepArgs&, int64_t begin, int64_t end);
  void (*winograd_conv)(const WinogradConvArgs&, int64_t begin, int64_t end);
  void (*max_pool[2])(const MaxPoolArgs&, int64_t begin, int64_t end);
  void (*max_pool_backward[2])(const MaxPoolArgs&, int64_t begin, int64_t end);
  void (*conv_input_gradient)(const ConvInputGradientArgs&, int64_t begin, int64_t end);
  void (*blocked_conv)(const BlockedConvArgs&, int64_t begin, int64_t end);
};

namespace baseline { const Kernels& kernels(); }
namespace neon { const Kernels& kernels(); }
namespace avx2 { const Kernels& kernels(); }
namespace avx512 { const Kernels& kernels(); }

// The best set that this CPU runs; ZSU_FAST_CPU_ISA=baseline|avx2|avx512 lowers it.
const Kernels& kernels();

} // namespace zsu
