// The kernels compiled for CPUs with AVX2, FMA and F16C.
// System headers come before any target pragma: otherwise an inline function of theirs, emitted for this
// instruction set, could be the copy that other files link to.
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#if defined(ZSU_HAS_ISA_LEVELS)
#pragma GCC target("avx2,fma,f16c")
#define ZSU_ISA avx2
#define ZSU_F16C
#define ZSU_FMA
#include "kernel_table.h"
#endif
