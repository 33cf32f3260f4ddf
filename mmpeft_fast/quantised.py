"""bitsandbytes' quantised linear layers, and PEFT layers on them, as the fused ops take them.

Imported only where bitsandbytes already is. NF4 and FP4 (Dettmers et al. 2023, section 3) are unpacked to the dtype
that the layer multiplies in, in training and in evaluation. Their own forward does the same, but in evaluation on a CPU
with AVX512-BF16, where it rounds each block's scale to bfloat16. int8 is unpacked in training on a CPU, where the
layer's own forward does the same; anywhere else that rounds its input to int8 (Dettmers et al. 2022), and such layers
stay as they are.
"""

import functools
from collections.abc import Callable
from math import prod

import bitsandbytes.functional
import peft.tuners.ia3 as peft_ia3
import peft.tuners.lora as peft_lora
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, LinearFP4, LinearNF4, Params4bit
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from mmpeft_fast.hf_peft import read_ia3, read_lora
from mmpeft_fast.layers.peft_linear import PeftLinear, register_base
from mmpeft_fast.layers.sites import LinearSite, Unfusable, read_peft_linear, register_linear
from mmpeft_fast.ops import csrc
from mmpeft_fast.ops.packed import PackedWeight
from mmpeft_fast.ops.segments import Segment

FORMATS = ("nf4", "fp4", "int8")
_FOUR_BIT, _EIGHT_BIT = "linear_4bit", "linear_8bit"  # what their forwards are known as
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ops = torch.ops.bitsandbytes


# Else the products inside the library's own op, which HF PEFT's layers run, are not counted.
@register_flop_formula(_ops.gemm_4bit)
def _gemm_4bit_flops(x_shape, packed_shape, weight_shape, *arguments, out_shape=None, **options) -> int:
    return 2 * prod(x_shape) * weight_shape[0]


@torch.library.register_fake("bitsandbytes::dequantize_4bit.out")
def _dequantize_4bit_on_meta(packed, scales, blocksize, quant_type, shape, dtype, out) -> None:
    """In place of the library's, which compares `shape`, a list, with a torch.Size and always raises."""


class FourBit(PackedWeight):
    """NF4 or FP4: two indices into a table of 16 numbers a byte, and a scale for each block."""

    def __init__(self, linear: Linear4bit):
        state = linear.weight.quant_state
        super().__init__(state.shape, linear.weight.device, linear.compute_dtype)
        self.name, self._linear = state.quant_type, linear

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        state = self._linear.weight.quant_state
        nested = (state.offset, state.state2.absmax, state.state2.code) if state.nested else ()
        return (self._linear.weight.data, state.absmax, state.code, *nested)

    def why_not_now(self) -> str | None:
        if getattr(self._linear.weight.quant_state, "packing_format_for_cpu", False):
            return "bitsandbytes has packed its weights for a kernel of its own; expected them as they were loaded"
        return None

    def unpack(self, out: Tensor) -> None:
        packed, state = self._linear.weight.data, self._linear.weight.quant_state
        scales = state.absmax
        if state.nested:
            scales = bitsandbytes.functional.dequantize_blockwise(scales, state.state2) + state.offset
        # bitsandbytes' AVX512 kernel takes other scales where a row is not a number of whole blocks.
        is_whole = out.shape[1] % state.blocksize == 0
        if is_whole and out.device.type == "cpu" and out.dtype in _KERNEL_DTYPES and csrc.why_unavailable() is None:
            packed = packed.view(torch.uint8).view(-1)
            torch.ops.mmpeft_fast_c.unpack_4bit(packed, scales.float(), state.code, state.blocksize, out)
            return
        dtype = out.dtype if out.dtype in _KERNEL_DTYPES else torch.float32
        options = state.blocksize, state.quant_type, state.shape, dtype
        if out.device.type != "cpu" and out.dtype == dtype and out.is_contiguous():
            _ops.dequantize_4bit.out(packed, scales, *options, out=out)
        else:
            out.copy_(_ops.dequantize_4bit(packed, scales, *options))


class EightBit(PackedWeight):
    """int8 with a scale a row: W = CB SCB / 127."""

    name = "int8"

    def __init__(self, linear: Linear8bitLt):
        super().__init__(linear.weight.shape, linear.weight.device, None)
        self._linear = linear

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        linear = self._linear
        holder = linear.state if linear.weight.CB is None else linear.weight  # its first call moves them
        return holder.CB, holder.SCB

    def why_not_now(self) -> str | None:
        return None if self._linear.training else "an 8-bit layer rounds its input to int8 in evaluation"

    def unpack(self, out: Tensor) -> None:
        values, scales = self.tensors
        scales = scales * (1.0 / 127.0)
        if out.dtype in _KERNEL_DTYPES and csrc.why_unavailable() is None:
            torch.ops.mmpeft_fast_c.unpack_8bit(values, scales, out)
        else:
            out.copy_(values)
            out.mul_(scales.unsqueeze(1))


def _read_4bit(linear: Linear4bit) -> LinearSite:
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        raise Unfusable("a 4-bit layer is not quantised yet; bitsandbytes does that as it moves to a device")
    if tuple(state.shape) != (linear.out_features, linear.in_features):
        raise Unfusable(f"a 4-bit weight has sizes {list(state.shape)}; expected [N, K] of its layer")
    return LinearSite(Segment(FourBit(linear), linear.bias))


def _read_8bit(linear: Linear8bitLt) -> LinearSite:
    if linear.state.has_fp16_weights:
        raise Unfusable("an 8-bit layer quantises its weight at every call; expected has_fp16_weights=False")
    if linear.weight.device.type not in ("cpu", "meta"):
        raise Unfusable("an 8-bit layer rounds its input to int8, unless it trains on a CPU")
    return LinearSite(Segment(EightBit(linear), linear.bias))


class PeftLinear4bit(PeftLinear, Linear4bit):
    """A PeftLinear on a 4-bit layer."""

    plain = Linear4bit

    def dense_weight(self):
        return FourBit(self).dense(torch.float32)


class PeftLinear8bit(PeftLinear, Linear8bitLt):
    """A PeftLinear on an 8-bit layer."""

    plain = Linear8bitLt

    def dense_weight(self):
        return EightBit(self).dense(torch.float32)


_READERS = {_FOUR_BIT: _read_4bit, _EIGHT_BIT: _read_8bit, "lora_linear": read_lora, "ia3_linear": read_ia3}
# The libraries' classes, and what their forwards are known as.
ROLES = {
    **dict.fromkeys((Linear4bit, LinearNF4, LinearFP4), _FOUR_BIT),
    Linear8bitLt: _EIGHT_BIT,
    **dict.fromkeys((peft_lora.Linear4bit, peft_lora.Linear8bitLt), "lora_linear"),
    **dict.fromkeys((peft_ia3.Linear4bit, peft_ia3.Linear8bitLt), "ia3_linear"),
}


def quantise(
    model: nn.Module, name: str, *, compute_dtype: torch.dtype | None = None, nested: bool = True
) -> nn.Module:
    """Puts every linear layer of a dense model but its output head into a format, in place, as transformers loads a
    model with a `BitsAndBytesConfig`. On the meta device everything has its sizes and no values.

    Args:
        model: a transformers model without PEFT parameters.
        name: one of FORMATS.
        compute_dtype: what 4-bit weights are multiplied in; the model's dtype when None.
        nested: the scales of 4-bit blocks are themselves 8-bit ("double quantisation").

    Raises:
        ValueError: another name.
    """
    if name not in FORMATS:
        raise ValueError(f"quantise: expected a format in {list(FORMATS)}, got {name!r}")
    head = model.get_output_embeddings()
    for path, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and linear is not head:
            dtype = compute_dtype or linear.weight.dtype
            new = _eight_bit(linear) if name == "int8" else _four_bit(linear, name, dtype, nested)
            new.bias = linear.bias
            model.set_submodule(path, new.train(linear.training))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = name == "int8", name != "int8"  # HF PEFT asks for these
    return model


def _four_bit(linear: nn.Linear, name: str, dtype: torch.dtype, nested: bool) -> Linear4bit:
    options = {"compress_statistics": nested, "quant_type": name}
    new = Linear4bit(linear.in_features, linear.out_features, False, compute_dtype=dtype, device="meta", **options)
    weight = linear.weight.detach()
    if not weight.is_meta:
        new.weight = Params4bit(weight, requires_grad=False, module=new, **options)
        return new.to(weight.device)
    empty = functools.partial(torch.empty, device="meta")
    count = weight.numel()
    scales, state2, offset = empty(-(-count // 64)), None, None
    if nested:
        state2 = QuantState(empty(-(-scales.numel() // 256)), code=empty(256), blocksize=256, dtype=torch.float32)
        scales, offset = empty(scales.shape, dtype=torch.uint8), empty(())
    state = QuantState(scales, weight.shape, empty(16), 64, name, weight.dtype, offset, state2)
    packed = empty((count + 1) // 2, 1, dtype=torch.uint8)
    new.weight = Params4bit(packed, requires_grad=False, module=new, quant_state=state, bnb_quantized=True, **options)
    new.quant_state = state
    return new


def _eight_bit(linear: nn.Linear) -> Linear8bitLt:
    weight = linear.weight.detach()
    sizes = linear.in_features, linear.out_features
    new = Linear8bitLt(*sizes, False, has_fp16_weights=False, threshold=6.0, device="meta")
    if not weight.is_meta:
        new.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return new.to(weight.device)
    values = torch.empty(weight.shape, dtype=torch.int8, device="meta")
    scales = torch.empty(weight.shape[0], device="meta")
    new.weight = Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
    return new


def dequantise(model: nn.Module, dtype: torch.dtype) -> dict[nn.Module, nn.Linear]:
    """Puts a plain, frozen layer in the place of each packed one, in place. Returns what each became."""
    dense: dict[nn.Module, nn.Linear] = {}
    for path, linear in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(linear, Linear4bit | Linear8bitLt):
            continue
        if linear not in dense:
            new = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            new.weight = nn.Parameter(_packed(linear).dense(dtype), requires_grad=False)
            new.bias = linear.bias
            dense[linear] = new.train(linear.training)
        model.set_submodule(path, dense[linear])
    model.is_loaded_in_8bit = model.is_loaded_in_4bit = False
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    return dense


def packed_again(weight: Tensor, linear: nn.Module) -> Tensor:
    """What a weight [N, K] becomes in the format of a layer, as a float32 tensor."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(linear, Linear8bitLt):
        return EightBit(_eight_bit(plain)).dense(torch.float32)
    state = linear.weight.quant_state
    return FourBit(_four_bit(plain, state.quant_type, torch.float32, state.nested)).dense(torch.float32)


def _packed(linear: nn.Module) -> PackedWeight:
    return EightBit(linear) if isinstance(linear, Linear8bitLt) else FourBit(linear)


def move_packed(model: nn.Module, move: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Exchanges what packed weights lie in memory as by what `move` makes of it; returns what of that is no parameter:
    scales, tables, offsets."""
    others = []
    for linear in model.modules():
        if isinstance(linear, Linear4bit):
            weight, state = linear.weight, linear.weight.quant_state
            for holder in (state, state.state2) if state.nested else (state,):
                for name in ("absmax", "code", "offset"):
                    if isinstance(getattr(holder, name, None), Tensor):
                        setattr(holder, name, move(getattr(holder, name)))
                        others.append(getattr(holder, name))
            # The classes of bitsandbytes' own parameters cannot hold every kind of tensor.
            linear.weight = nn.Parameter(move(weight.data), requires_grad=False)
            linear.weight.quant_state = state
        elif isinstance(linear, Linear8bitLt):
            holder = linear.state if linear.weight.CB is None else linear.weight
            values, scales = move(linear.weight.data), move(holder.SCB)
            linear.weight = nn.Parameter(values, requires_grad=False)
            linear.weight.CB, linear.weight.SCB = values, scales
            others.append(scales)
    return others


@functools.cache
def register() -> None:
    """Lets sites be read on bitsandbytes' layers, and branches be put on them."""
    for kind, role in ROLES.items():
        register_linear(kind, _READERS[role], role)
    for kind in (Linear4bit, LinearNF4, LinearFP4):
        register_base(kind, PeftLinear4bit)
    register_base(Linear8bitLt, PeftLinear8bit)
    for kind in (PeftLinear4bit, PeftLinear8bit):
        register_linear(kind, read_peft_linear, "peft_linear")
