// The kernels compiled for any CPU.
// System headers come before any target pragma: otherwise an inline function of theirs, emitted for this
// instruction set, could be the copy that other files link to.
#include <cmath>
#include <cstdint>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define ZSU_ISA baseline
#include "kernel_table.h"
