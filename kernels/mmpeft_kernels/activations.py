"""Activations of bottleneck branches as device functions: z = f(a) and f'(a), in float32."""

import triton
import triton.language as tl

ACTIVATIONS = ("identity", "tanh", "relu", "gelu", "silu")

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _tanh(a):
    # The exponential form loses every digit near 0; the odd series up to a^9 has error below 1e-8 for |a| < 1/4.
    square = a * a
    series = a * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    magnitude = 1 - 2 / (tl.exp(2 * tl.abs(a)) + 1)
    return tl.where(square < 1 / 16, series, tl.where(a < 0, -magnitude, magnitude))


@triton.jit
def activate(a, ACTIVATION: tl.constexpr):
    """f(a) of a float32 block."""
    if ACTIVATION == "tanh":
        z = _tanh(a)
    elif ACTIVATION == "relu":
        z = tl.maximum(a, 0.0)
    elif ACTIVATION == "gelu":
        z = 0.5 * a * (1 + tl.erf(a * _SQRT_HALF))
    elif ACTIVATION == "silu":
        z = a * tl.sigmoid(a)
    else:
        z = a
    return z


@triton.jit
def activation_derivative(a, ACTIVATION: tl.constexpr):
    """f'(a) of a float32 block."""
    if ACTIVATION == "tanh":
        z = _tanh(a)
        derivative = 1 - z * z
    elif ACTIVATION == "relu":
        derivative = (a > 0).to(tl.float32)
    elif ACTIVATION == "gelu":
        derivative = 0.5 * (1 + tl.erf(a * _SQRT_HALF)) + a * tl.exp(-0.5 * a * a) * _INVERSE_SQRT_2PI
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(a)
        derivative = sigmoid * (1 + a * (1 - sigmoid))
    else:
        derivative = tl.full(a.shape, 1.0, tl.float32)
    return derivative
