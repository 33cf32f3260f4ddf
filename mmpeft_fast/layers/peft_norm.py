"""An RMSNorm whose trained gain is at least float32, over activations of any dtype.

Gains start at or near 1, where bfloat16 cannot represent a change below 2^-8: trained in the model's half precision
they would not move at the learning rates of LayerNorm-tuning (2e-4).
"""

from torch import Tensor, nn

from mmpeft_fast.layers.class_swap import Derived, subclass
from mmpeft_fast.layers.sites import read_norm, read_rms_norm
from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.ops.norms import rms_norm_ref


class WideGain(Derived):
    """Mixin for transformers' RMSNorms: the result has the input's dtype, not that of a wider gain."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm_ref(hidden_states, *read_rms_norm(self))


def train_gain(norm: nn.Module) -> None:
    """Makes the gain of an RMSNorm trainable, in place, widening it to float32 where it is narrower.

    Raises:
        ValueError: not an RMSNorm.
    """
    read_norm(norm, is_called=True)
    wide = accumulate_dtype(norm.weight.dtype)
    if norm.weight.dtype != wide:
        norm.weight = nn.Parameter(norm.weight.detach().to(wide))
        norm.__class__ = subclass(WideGain, type(norm))
    norm.weight.requires_grad_(True)
