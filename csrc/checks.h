// What every op checks about its arguments, on any device, and the forms in which kernels read them.
#pragma once

#include "refusal.h" // before torch's headers

#include "ascent_step.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

namespace zsu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType accumulator_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_float(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16,
      name, " must be float32, float64, float16 or bfloat16");
}

inline void check_same_device(const Tensor& a, const Tensor& b, const char* name) {
  STD_TORCH_CHECK(a.device() == b.device(), name, " must be on the device of the first argument");
}

inline void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [batch, classes], got ", logits.dim(), " dimensions");
  STD_TORCH_CHECK(logits.size(0) == 0 || logits.size(1) > 0, "logits must have at least one class");
  check_float(logits, "logits");
}

inline void check_per_row(const Tensor& t, const Tensor& logits, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == logits.size(0), name, " must be [batch] = [", logits.size(0), "]");
  check_same_device(logits, t, name);
}

inline void check_coef(const Tensor& coef, const Tensor& logits) {
  check_per_row(coef, logits, "coef");
  check_float(coef, "coef");
}

// Returns t with contiguous classes; rows may be any distance apart.
inline Tensor with_dense_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor contiguous_as(const Tensor& t, ScalarType type) {
  const Tensor converted = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

// Uninitialised and contiguous, on the device of `like`. torch::stable::new_empty looks up its op by name
// on every call: a microsecond, a tenth of the time of a small batch.
template <size_t dims>
Tensor empty_like(const Tensor& like, const int64_t (&sizes)[dims], ScalarType type) {
  int64_t strides[dims];
  int64_t stride = 1;
  for (size_t d = dims; d-- > 0; stride *= sizes[d]) strides[d] = stride;
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device, like.get_device_index(), &handle));
  return Tensor(handle);
}

// ---- signed_cross_entropy ------------------------------------------------------------------------
struct SignedCrossEntropyInputs {
  Tensor logits; // dense rows
  Tensor target; // int64, contiguous
  Tensor coef;   // of the accumulator's type, contiguous
};

inline SignedCrossEntropyInputs signed_cross_entropy_inputs(
    const Tensor& logits, const Tensor& target, const Tensor& coef) {
  check_logits(logits);
  check_per_row(target, logits, "target");
  const ScalarType type = target.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int, "target must be int64 or int32");
  check_coef(coef, logits);
  return {
      with_dense_rows(logits), contiguous_as(target, ScalarType::Long), contiguous_as(coef, accumulator_of(logits))};
}

// ---- masked_cross_entropy ------------------------------------------------------------------------
struct MaskedCrossEntropyInputs {
  Tensor logits;  // dense rows
  Tensor teacher; // of the type of logits or of the accumulator, dense rows
  Tensor forget;  // contiguous
  Tensor coef;    // of the accumulator's type, contiguous
  std::optional<Tensor> index; // int64, contiguous
  std::optional<Tensor> keep;  // of the accumulator's type, contiguous
};

inline MaskedCrossEntropyInputs masked_cross_entropy_inputs(
    const Tensor& logits, const Tensor& teacher, const Tensor& forget, const Tensor& coef,
    const std::optional<Tensor>& index, const std::optional<Tensor>& keep) {
  check_logits(logits);
  check_coef(coef, logits);
  check_float(teacher, "teacher");
  check_same_device(logits, teacher, "teacher");
  check_same_device(logits, forget, "forget");
  const int64_t rows = logits.size(0), classes = logits.size(1);
  STD_TORCH_CHECK(teacher.dim() == 2 && teacher.size(1) == classes, "teacher must have the classes of logits");
  STD_TORCH_CHECK(
      forget.dim() == 1 && forget.size(0) == classes && forget.scalar_type() == ScalarType::Bool,
      "forget must be bool [classes] = [", classes, "]");
  if (index) {
    check_per_row(*index, logits, "index");
    STD_TORCH_CHECK(index->scalar_type() == ScalarType::Long, "index must be int64");
    STD_TORCH_CHECK(rows == 0 || teacher.size(0) > 0, "teacher must have the rows that index names");
  } else {
    STD_TORCH_CHECK(teacher.size(0) == rows, "teacher must have the shape of logits, without index");
  }
  if (keep) {
    check_per_row(*keep, logits, "keep");
    check_float(*keep, "keep");
  }
  const ScalarType type = accumulator_of(logits);
  const bool same = teacher.scalar_type() == logits.scalar_type();
  MaskedCrossEntropyInputs in{
      with_dense_rows(logits), with_dense_rows(same ? teacher : torch::stable::to(teacher, type)),
      contiguous_as(forget, ScalarType::Bool), contiguous_as(coef, type), std::nullopt, std::nullopt};
  if (index) in.index = contiguous_as(*index, ScalarType::Long);
  if (keep) in.keep = contiguous_as(*keep, type);
  return in;
}

// ---- scale_rows_ ---------------------------------------------------------------------------------
inline void check_scale_rows(const Tensor& rows, const Tensor& coef, const Tensor& grad) {
  check_logits(rows);
  check_per_row(coef, rows, "coef");
  STD_TORCH_CHECK(grad.numel() == 1 || (grad.dim() == 1 && grad.numel() == 2), "grad must hold 1 or 2 numbers");
  STD_TORCH_CHECK(grad.scalar_type() == accumulator_of(rows), "grad must have the dtype of the loss");
  STD_TORCH_CHECK(rows.size(1) <= 1 || rows.stride(1) == 1, "the classes of a row must be contiguous");
  check_same_device(rows, grad, "grad");
}

// ---- ascent_step_ --------------------------------------------------------------------------------
// Whether each row of t is one block of memory, in contiguous or in channels-last order.
inline bool is_dense(const Tensor& t, bool channels_last) {
  // strides of dimensions of size 1 are arbitrary
  int64_t expected = 1;
  const auto follow = [&](int64_t d) {
    const bool fits = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return fits;
  };
  if (channels_last && !follow(1)) return false;
  for (int64_t d = t.dim() - 1; d >= (channels_last ? 2 : 1); --d)
    if (!follow(d)) return false;
  return follow(0);
}

inline void check_like_x(const Tensor& t, const Tensor& x, bool channels_last, const char* name) {
  check_same_device(x, t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(t.dim() == x.dim(), name, " must have the shape of x");
  for (int64_t d = 0; d < x.dim(); ++d) STD_TORCH_CHECK(t.size(d) == x.size(d), name, " must have the shape of x");
  STD_TORCH_CHECK(
      x.numel() == 0 || is_dense(t, channels_last), name, " must be contiguous or channels-last, with the layout of x");
}

// x, grad and the moments share one shape and one layout, contiguous or channels-last.
inline AscentStepTensors ascent_step_tensors(
    const Tensor& x, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step,
    const Tensor& active, const Tensor& low, const Tensor& high, const Tensor& lr, const Tensor& beta) {
  STD_TORCH_CHECK(x.dim() >= 1, "x must have a batch dimension");
  AscentStepTensors args{};
  args.rows = x.size(0);
  args.row_size = 1;
  for (int64_t d = 1; d < x.dim(); ++d) args.row_size *= x.size(d);
  args.channels = x.dim() > 1 ? x.size(1) : 1;
  args.bounds = low.numel();
  args.lr_stride = lr.numel() > 1 ? 1 : 0;
  args.channels_last = x.numel() > 0 && x.dim() > 2 && !is_dense(x, false) && is_dense(x, true);

  check_like_x(x, x, args.channels_last, "x");
  check_like_x(grad, x, args.channels_last, "grad");
  check_like_x(exp_avg, x, args.channels_last, "exp_avg");
  check_like_x(exp_avg_sq, x, args.channels_last, "exp_avg_sq");
  const auto check_flat = [&](const Tensor& t, ScalarType type, int64_t n, const char* name, const char* what) {
    check_same_device(x, t, name);
    STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == n && t.is_contiguous(), name, " must be ", what);
  };
  check_flat(step, ScalarType::Int, args.rows, "step", "int32 [rows], contiguous");
  check_flat(active, ScalarType::Bool, args.rows, "active", "bool [rows], contiguous");
  STD_TORCH_CHECK(args.bounds == 1 || args.bounds == args.channels, "low must hold 1 or x.shape[1] numbers");
  check_flat(low, ScalarType::Float, args.bounds, "low", "float32, contiguous");
  check_flat(high, ScalarType::Float, args.bounds, "high", "float32, contiguous, as long as low");
  STD_TORCH_CHECK(lr.numel() == 1 || lr.numel() == args.rows, "lr must hold 1 or rows numbers");
  check_flat(lr, ScalarType::Float, lr.numel(), "lr", "float32, contiguous");
  check_flat(beta, ScalarType::Float, 1, "beta", "float32, one number");

  args.x = x.mutable_data_ptr<float>();
  args.grad = grad.const_data_ptr<float>();
  args.exp_avg = exp_avg.mutable_data_ptr<float>();
  args.exp_avg_sq = exp_avg_sq.mutable_data_ptr<float>();
  args.step = step.const_data_ptr<int32_t>();
  args.active = active.const_data_ptr<bool>();
  args.low = low.const_data_ptr<float>();
  args.high = high.const_data_ptr<float>();
  args.lr = lr.const_data_ptr<float>();
  args.beta = beta.const_data_ptr<float>();
  return args;
}

// ---- winograd_conv -------------------------------------------------------------------------------
inline void check_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t outputs) {
  if (!bias) return;
  check_same_device(x, *bias, "bias");
  STD_TORCH_CHECK(
      bias->dim() == 1 && bias->size(0) == outputs && bias->scalar_type() == ScalarType::Float && bias->is_contiguous(),
      "bias must be float32 [outputs], contiguous");
}

inline void check_winograd_conv(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& other,
    int64_t outputs, int64_t padding) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [batch, inputs, height, width], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32");
  STD_TORCH_CHECK(x.numel() == 0 || is_dense(x, true), "x must be channels-last");
  check_same_device(x, weight, "weight");
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(0) == 36 && weight.size(2) == x.size(1) && x.size(1) > 0 &&
          weight.scalar_type() == ScalarType::Float && weight.is_contiguous(),
      "weight must be float32 [36, blocks, inputs, block], contiguous, with the inputs of x");
  const int64_t block = weight.size(3);
  STD_TORCH_CHECK(
      block == 16 || block == 32 || block == 48 || block == 64, "a block of weight must have 16, 32, 48 or 64 outputs");
  STD_TORCH_CHECK(
      outputs > 0 && outputs <= weight.size(1) * block && outputs > (weight.size(1) - 1) * block,
      "outputs must end in the last block of weight");
  STD_TORCH_CHECK(padding >= 0 && padding <= 2, "padding must be 0, 1 or 2");
  STD_TORCH_CHECK(
      x.size(2) + 2 * padding >= 3 && x.size(3) + 2 * padding >= 3, "x must be at least 3x3 with its padding");
  if (other) {
    check_same_device(x, *other, "other");
    STD_TORCH_CHECK(
        other->dim() == 4 && other->size(0) == x.size(0) && other->size(1) == outputs &&
            other->size(2) == x.size(2) + 2 * padding - 2 && other->size(3) == x.size(3) + 2 * padding - 2 &&
            other->scalar_type() == ScalarType::Float && (other->numel() == 0 || is_dense(*other, true)),
        "other must be float32 of the shape of the output, channels-last");
  }
  check_bias(bias, x, outputs);
}

// ---- max_pool ------------------------------------------------------------------------------------
inline void check_maps(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must be [batch, channels, height, width], got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
      name, " must be float32 or bfloat16");
  STD_TORCH_CHECK(t.numel() == 0 || is_dense(t, true), name, " must be channels-last");
}

// Along one dimension, each of `outputs` windows must begin in the input, or in the padding before it.
inline void check_windows(int64_t size, int64_t outputs, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(
      outputs >= 0 && (outputs == 0 || (size > 0 && (outputs - 1) * stride - padding < size)),
      "windows must not begin beyond the input");
}

inline void check_pooling(int64_t kernel, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(kernel >= 1 && kernel <= 15, "kernel must be 1 to 15");
  STD_TORCH_CHECK(stride >= 1, "stride must be at least 1");
  STD_TORCH_CHECK(padding >= 0 && 2 * padding <= kernel, "padding must be 0 to half of kernel");
}

inline void check_max_pool(
    const Tensor& x, int64_t kernel, int64_t stride, int64_t padding, int64_t out_height, int64_t out_width) {
  check_maps(x, "x");
  check_pooling(kernel, stride, padding);
  check_windows(x.size(2), out_height, stride, padding);
  check_windows(x.size(3), out_width, stride, padding);
}

inline void check_max_pool_backward(
    const Tensor& grad, const Tensor& place, int64_t kernel, int64_t stride, int64_t padding, int64_t height,
    int64_t width) {
  check_maps(grad, "grad");
  check_same_device(grad, place, "place");
  bool fits = place.dim() == 4 && place.scalar_type() == ScalarType::Byte;
  for (int64_t d = 0; fits && d < 4; ++d) fits = place.size(d) == grad.size(d);
  STD_TORCH_CHECK(
      fits && (place.numel() == 0 || is_dense(place, true)), "place must be uint8, channels-last, of the shape of grad");
  check_pooling(kernel, stride, padding);
  check_windows(height, grad.size(2), stride, padding);
  check_windows(width, grad.size(3), stride, padding);
}

// ---- conv_input_gradient -------------------------------------------------------------------------
inline void check_conv_input_gradient(
    const Tensor& grad, const Tensor& weight, int64_t stride, int64_t top, int64_t left, int64_t height,
    int64_t width) {
  check_maps(grad, "grad");
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float, "grad must be float32");
  check_same_device(grad, weight, "weight");
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous() && weight.numel() > 0 &&
          weight.size(3) == grad.size(1),
      "weight must be float32 [height, width, inputs, outputs], contiguous, with the channels of grad as outputs");
  STD_TORCH_CHECK(weight.size(2) <= 4, "weight must have at most 4 inputs");
  STD_TORCH_CHECK(stride >= 1, "stride must be at least 1");
  STD_TORCH_CHECK(
      top >= 0 && top < weight.size(0) && left >= 0 && left < weight.size(1), "padding must be less than the kernel");
  check_windows(height, grad.size(2), stride, top);
  check_windows(width, grad.size(3), stride, left);
}

// ---- blocked_conv --------------------------------------------------------------------------------
constexpr int64_t images_per_block = 16;

inline void check_blocked_conv(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t top, int64_t left,
    int64_t out_height, int64_t out_width) {
  STD_TORCH_CHECK(
      x.dim() == 5 && x.size(4) == images_per_block && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
      "x must be float32 [blocks, channels, height, width, 16], contiguous");
  check_same_device(x, weight, "weight");
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous() && weight.numel() > 0 &&
          weight.size(0) == x.size(1),
      "weight must be float32 [inputs, height, width, outputs], contiguous, with the channels of x as inputs");
  STD_TORCH_CHECK(
      top >= 0 && top < weight.size(1) && left >= 0 && left < weight.size(2), "padding must be less than the kernel");
  check_windows(x.size(2), out_height, 1, top);
  check_windows(x.size(3), out_width, 1, left);
  check_bias(bias, x, weight.size(3));
}

} // namespace zsu
