// Defines the kernel table of one instruction set. Each isa_*.cpp includes it once, with ZSU_ISA set to
// the name of the set.
#pragma once

#define ZSU_STRING(name) #name
#define ZSU_STRING_OF(name) ZSU_STRING(name)

namespace zsu::ZSU_ISA {

// Not a std::vector: its code would be emitted for this instruction set under a name that files share.
template <class A>
struct Scratch {
  A* data;
  explicit Scratch(int64_t n) : data(n > 0 ? new A[static_cast<size_t>(n)] : nullptr) {}
  ~Scratch() { delete[] data; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

} // namespace zsu::ZSU_ISA

#include "ascent_step_kernel.h"
#include "blocked_conv_kernel.h"
#include "conv_input_gradient_kernel.h"
#include "masked_cross_entropy_kernel.h"
#include "max_pool_kernel.h"
#include "scale_rows_kernel.h"
#include "signed_cross_entropy_kernel.h"
#include "winograd_conv_kernel.h"

namespace zsu::ZSU_ISA {

const Kernels& kernels() {
  static constexpr Kernels table{
      ZSU_STRING_OF(ZSU_ISA),
      {signed_cross_entropy_kernel<float, float>, signed_cross_entropy_kernel<double, double>,
       signed_cross_entropy_kernel<float, BFloat16>, signed_cross_entropy_kernel<float, Float16>},
      {masked_cross_entropy_kernel<float, float, float>, masked_cross_entropy_kernel<double, double, double>,
       masked_cross_entropy_kernel<float, BFloat16, BFloat16>, masked_cross_entropy_kernel<float, Float16, Float16>,
       masked_cross_entropy_kernel<float, BFloat16, float>, masked_cross_entropy_kernel<float, Float16, float>},
      {scale_rows_kernel<float, float>, scale_rows_kernel<double, double>,
       scale_rows_kernel<float, BFloat16>, scale_rows_kernel<float, Float16>},
      ascent_step_kernel,
      winograd_conv_kernel,
      {max_pool_kernel<float>, max_pool_kernel<BFloat16>},
      {max_pool_backward_kernel<float>, max_pool_backward_kernel<BFloat16>},
      conv_input_gradient_kernel,
      blocked_conv_kernel,
  };
  return table;
}

} // namespace zsu::ZSU_ISA
