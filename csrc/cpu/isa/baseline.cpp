// The row kernels for every processor of the architecture.
#define MMPEFT_ISA isa_default
#define MMPEFT_NAME "default"
#define MMPEFT_LANES 4

#include "csrc/cpu/rows/table.h"
