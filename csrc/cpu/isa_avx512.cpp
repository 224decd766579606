// The kernels compiled for CPUs with AVX-512 F, DQ, BW and VL.
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
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")
#define ZSU_ISA avx512
#define ZSU_F16C
#define ZSU_FMA
#define ZSU_AVX512
#include "kernel_table.h"
#endif
