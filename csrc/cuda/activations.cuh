// Activations of bottleneck branches, z = f(a), and their derivatives, in float32.
#pragma once

#include "activations.h"

namespace mmpeft::cuda {

__device__ inline float sigmoid(float a) { return 1.0f / (1.0f + expf(-a)); }

__device__ inline float activate(Activation activation, float a) {
  switch (activation) {
    case Activation::kTanh: return tanhf(a);
    case Activation::kRelu: return a > 0.0f || a != a ? a : 0.0f;
    case Activation::kGelu: return 0.5f * a * (1.0f + erff(a * 0.7071067811865476f));
    case Activation::kSilu: return a * sigmoid(a);
    default: return a;
  }
}

__device__ inline float activation_derivative(Activation activation, float a) {
  switch (activation) {
    case Activation::kTanh: {
      const float z = tanhf(a);
      return 1.0f - z * z;
    }
    case Activation::kRelu: return a > 0.0f ? 1.0f : 0.0f;
    case Activation::kGelu:
      return 0.5f * (1.0f + erff(a * 0.7071067811865476f)) + a * expf(-0.5f * a * a) * 0.3989422804014327f;
    case Activation::kSilu: {
      const float s = sigmoid(a);
      return s * (1.0f + a * (1.0f - s));
    }
    default: return 1.0f;
  }
}

}  // namespace mmpeft::cuda
