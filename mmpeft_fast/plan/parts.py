"""The parts of a training step by which time, bytes and launches are listed, and how a launch finds its part.

The part follows from the module that runs (forward or backward) and, inside the decoder, from the op.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from mmpeft_fast.layers.class_swap import is_swapped
from mmpeft_fast.models import Family

# inputs: embeddings, placing image features, positions and masks; elementwise: what lies between GEMMs, attention and
# norms in the decoder (activation, rotation, dropout, residual sums, casts).
PARTS = ("vision", "connector", "inputs", "norms", "gemms", "attention", "elementwise", "head", "optimizer")

GEMM_OPS = frozenset(
    ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "convolution", "convolution_backward", "lowrank_gemm",
     "lowrank_gemm_dx", "dy_pass", "post_branch", "prologue none", "prologue_backward none")
)  # fmt: skip
ATTENTION_OPS = frozenset(
    ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
     "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
     "_flash_attention_forward", "_efficient_attention_forward", "merge_prefix")
)  # fmt: skip
ATTENTION_BACKWARD_OPS = frozenset(
    ("_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention_backward",
     "_scaled_dot_product_cudnn_attention_backward", "_scaled_dot_product_flash_attention_for_cpu_backward",
     "_flash_attention_backward", "_efficient_attention_backward", "prefix_backward")
)  # fmt: skip
_NORM_OPS = frozenset(("prologue rms_norm", "prologue_backward rms_norm"))


def part_of(region: str, op: str) -> str:
    """The part of an op by its name (of torch, or of the kernel set) in a region of `Regions`."""
    if region != "decoder":
        return region
    if op in GEMM_OPS:
        return "gemms"
    if op in ATTENTION_OPS or op in ATTENTION_BACKWARD_OPS:
        return "attention"
    return "norms" if op in _NORM_OPS else "elementwise"


class _Place(NamedTuple):
    region: str
    modules: list[nn.Module]


class Regions:
    """Context that knows which region of a model runs now: `current` is "decoder" or one of PARTS.

    Args:
        model: the model inside any wrapper of HF PEFT, of the family given.
    """

    def __init__(self, model: nn.Module, family: Family):
        decoder, head = family.decoder_of(model), model.get_output_embeddings()
        towers = family.modules_at(model, family.vision_tower)
        # A family's connector may be the head and the embeddings; those stay what they are.
        connectors = [
            module
            for module in family.modules_at(model, family.connector)
            if module is not head and module is not model.get_input_embeddings()
        ]
        # A fused layer reads its norms, a fused model its head, and calls neither.
        fused = [layer for layer in family.layers_of(model) if is_swapped(layer)]
        own = {id(inner) for module in (*towers, *connectors, *fused) for inner in module.modules()}
        norms = [module for module in decoder.modules() if _is_norm(module) and id(module) not in own]
        self._places = [
            _Place("decoder", [decoder]),
            _Place("vision", towers),
            _Place("connector", connectors),
            _Place("norms", norms),
            _Place("head", [] if head is None or is_swapped(model) else [head]),
        ]
        self._handles: list = []
        self._running: list[str] = []
        self._outside = "inputs"

    @property
    def current(self) -> str:
        return self._running[-1] if self._running else self._outside

    def start(self, outside: str) -> None:
        """Says what runs outside all modules from here on."""
        self._running.clear()
        self._outside = outside

    def _leave(self, region: str, outside: str) -> None:
        if region in self._running:
            del self._running[len(self._running) - 1 - self._running[::-1].index(region)]
        if region == "decoder":
            self._outside = outside

    def _hooks(self, region: str):
        """The pair of hooks of a module; outside the decoder runs the head after it, the inputs before it."""

        def before(module, args, kwargs):
            self._running.append(region)
            tensors = _differentiable((args, kwargs))
            if tensors:
                self._handles.append(register_multi_grad_hook(tensors, lambda grads: self._leave(region, "inputs")))

        def after(module, args, kwargs, output):
            self._leave(region, "head")
            tensors = _differentiable(output)
            if tensors:
                self._handles.append(register_multi_grad_hook(tensors, lambda grads: self._running.append(region)))

        return before, after

    def __enter__(self) -> "Regions":
        for region, modules in self._places:
            before, after = self._hooks(region)
            for module in modules:
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(after, with_kwargs=True))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "variance_epsilon") or isinstance(module, nn.LayerNorm)


def _differentiable(tree) -> list[Tensor]:
    """Tensors that a backward pass will reach; none of a checkpoint's second forward pass, which has no such pass and
    which hooks would keep alive."""
    if torch._C._current_graph_task_id() != -1:
        return []
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
