// Names of the activations of bottleneck branches.
#pragma once

namespace mmpeft::cuda {

enum class Activation : int { kIdentity, kTanh, kRelu, kGelu, kSilu };

}  // namespace mmpeft::cuda
