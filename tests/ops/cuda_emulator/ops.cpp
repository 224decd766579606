// The schemas of csrc/ops.cpp, for the emulated kernels.
#define zsu_fast zsu_emulated
#include "../../../csrc/ops.cpp"
