// The table of one build of the row kernels. The including file sets MMPEFT_ISA (its namespace) and MMPEFT_LANES.
#pragma once

#include "csrc/cpu/rows/cross_entropy.h"
#include "csrc/cpu/rows/elementwise.h"
#include "csrc/cpu/rows/heads.h"
#include "csrc/cpu/rows/prefix.h"
#include "csrc/cpu/rows/prologue.h"
#include "csrc/cpu/rows/prologue_backward.h"
#include "csrc/cpu/rows/unpack.h"

#define MMPEFT_FOR_EACH_DTYPE(kernel) {kernel<float>, kernel<BFloat16>, kernel<Float16>}

namespace mmpeft {
namespace MMPEFT_ISA {

extern const Kernels table;
const Kernels table = {
    MMPEFT_NAME,
    kLanes,
    keep_bits,
    MMPEFT_FOR_EACH_DTYPE(prologue),
    MMPEFT_FOR_EACH_DTYPE(prologue_backward),
    MMPEFT_FOR_EACH_DTYPE(heads),
    MMPEFT_FOR_EACH_DTYPE(heads_backward),
    {Packed<float>::kValues, Packed<BFloat16>::kValues, Packed<Float16>::kValues},
    MMPEFT_FOR_EACH_DTYPE(merge_prefix),
    MMPEFT_FOR_EACH_DTYPE(prefix_backward),
    MMPEFT_FOR_EACH_DTYPE(cross_entropy),
    MMPEFT_FOR_EACH_DTYPE(activation),
    MMPEFT_FOR_EACH_DTYPE(unpack_4bit),
    MMPEFT_FOR_EACH_DTYPE(unpack_8bit),
};

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
