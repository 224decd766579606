// The kernels compiled for any CPU; those of aarch64 have NEON.
// System headers come before any target pragma: otherwise an inline function of theirs, emitted for this
// instruction set, could be the copy that other files link to.
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

#if defined(__aarch64__)
#define ZSU_ISA neon
#define ZSU_NEON
#define ZSU_FMA
#else
#define ZSU_ISA baseline
#endif
#include "kernel_table.h"
