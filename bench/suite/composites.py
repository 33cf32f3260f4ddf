"""What other projects do for LoRA without fusing the frozen products, as small code of our own beside HF PEFT's layers.

`split_steps`, in the style of LoRAFusion (Zhu et al. 2026): one function a linear, low-rank products added into the
large ones; the dropped input and its mask are kept. `by_hand`, in the style of stacks with manual autograd (unsloth,
axolotl): one function for the whole MLP that keeps its input, gate and up, and one for each linear of attention.
Neither shares a low-rank pass between q, k and v. Adapters have the dtype of the model.
"""

import functools

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F


class _SplitSteps(torch.autograd.Function):
    """y = x W^T + b + s drop(x) D^T U^T.  x [M, K], W [N, K], D [R, K], U [N, R]."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scaling, probability):
        mask = None
        dropped = x
        if probability:
            dropped, mask = torch.native_dropout(x, probability, True)
        low = dropped @ down.T  # [M, R]
        y = F.linear(x, weight, bias).addmm_(low, up.T, alpha=scaling)
        ctx.save_for_backward(weight, down, up, low, dropped, mask)
        ctx.scaling, ctx.probability = scaling, probability
        return y

    @staticmethod
    def backward(ctx, dy):
        weight, down, up, low, dropped, mask = ctx.saved_tensors
        dlow = (dy @ up).mul_(ctx.scaling)
        dup, ddown = dy.T @ low * ctx.scaling, dlow.T @ dropped
        if not ctx.needs_input_grad[0]:
            return None, None, None, ddown, dup, None, None
        dx = dy @ weight
        if mask is None:
            dx.addmm_(dlow, down)
        else:
            dx += torch.ops.aten.native_dropout_backward(dlow @ down, mask, 1 / (1 - ctx.probability))
        return dx, None, None, ddown, dup, None, None


class _MlpByHand(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), each y = x W^T + s x D^T U^T; x [M, K]. `low`s are made again in the backward."""

    @staticmethod
    def forward(ctx, x, scalings, *tensors):
        gate_part, up_part, down_part = tensors[0:3], tensors[3:6], tensors[6:9]
        gate, up = _lora(x, *gate_part, scalings[0]), _lora(x, *up_part, scalings[1])
        ctx.save_for_backward(x, gate, up, *tensors)
        ctx.scalings = scalings
        return _lora(F.silu(gate) * up, *down_part, scalings[2])

    @staticmethod
    def backward(ctx, dy):
        x, gate, up, *tensors = ctx.saved_tensors
        gate_part, up_part, down_part = tensors[0:3], tensors[3:6], tensors[6:9]
        act = F.silu(gate)
        dh, *ddown = _lora_backward(dy, act * up, *down_part, ctx.scalings[2])
        dup = dh * act
        dgate = torch.ops.aten.silu_backward(dh.mul_(up), gate)
        dx, *dgates = _lora_backward(dgate, x, *gate_part, ctx.scalings[0])
        other, *dups = _lora_backward(dup, x, *up_part, ctx.scalings[1])
        return dx.add_(other), None, None, *dgates, None, *dups, None, *ddown


def _lora(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    return (x @ weight.T).addmm_(x @ down.T, up.T, alpha=scaling)


def _lora_backward(
    dy: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, ddown, dup)."""
    dlow = (dy @ up).mul_(scaling)
    return (dy @ weight).addmm_(dlow, down), dlow.T @ x, dy.T @ (x @ down.T) * scaling


def _parts(layer: PeftLinear) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float, float]:
    """(weight, bias, down, up, scaling, dropout) of HF PEFT's LoRA layer with one adapter."""
    (name,) = layer.active_adapters
    base, dropout = layer.get_base_layer(), layer.lora_dropout[name]
    probability = dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0
    return (
        base.weight,
        base.bias,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
        probability,
    )


def _linear_forward(layer: PeftLinear, x: Tensor) -> Tensor:
    return _SplitSteps.apply(x.flatten(0, -2), *_parts(layer)).unflatten(0, x.shape[:-1])


def _mlp_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    parts = [_parts(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    tensors = [tensor for weight, _, down, up, *_ in parts for tensor in (weight, down, up)]
    return _MlpByHand.apply(x.flatten(0, -2), tuple(part[4] for part in parts), *tensors).unflatten(0, x.shape[:-1])


def split_steps(model: nn.Module) -> nn.Module:
    """Gives every LoRA linear of an HF PEFT model the function of `_SplitSteps`, in place."""
    for module in model.modules():
        if isinstance(module, PeftLinear):
            module.forward = functools.partial(_linear_forward, module)
    return model


def by_hand(model: nn.Module) -> nn.Module:
    """`split_steps`, and one function for every MLP; without dropout."""
    split_steps(model)
    for module in model.modules():
        if all(isinstance(getattr(module, f"{name}_proj", None), PeftLinear) for name in ("gate", "up", "down")):
            module.forward = functools.partial(_mlp_forward, module)
    return model
