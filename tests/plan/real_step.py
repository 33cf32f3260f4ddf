"""A small model of any family, and one real training step of it on the CPU, measured as the planner counts it."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmpeft_fast import add_peft, fuse, provider
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.measure import peak_bytes, saved_bytes
from mmpeft_fast.models import FAMILIES
from mmpeft_fast.peft_model import study_method
from mmpeft_fast.plan.counting import attention_flops
from mmpeft_fast.plan.request import DENSE, Request
from mmpeft_fast.stored.baseline import add_baseline
from tests.tiny_models import VOCABULARY, token_id

TINY_IMAGE = 64  # pixels a side
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def tiny_config_folder(family_name: str, folder: Path, *, num_layers: int = 2) -> str:
    """A folder with the family's tiny configuration."""
    config = FAMILIES[family_name].tiny_config(VOCABULARY, token_id)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers + (family_name == "qwen3_vl")  # deepstack takes the first two layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    config.save_pretrained(folder)
    return str(folder)


class Real:
    """Stands in for placeholders: the same shapes with values."""

    @staticmethod
    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype)


class Measured(NamedTuple):
    saved_bytes: int
    peak_bytes: int
    flops: int


def _flash_flops(q, k, v, *args, **kwargs) -> int:
    return attention_flops(q, k, v, backward=False)


def _flash_backward_flops(dout, q, k, v, *args, **kwargs) -> int:
    return attention_flops(q, k, v, backward=True)


def _addmm_in_place_flops(y, a, b, **kwargs) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


for _rule in (_flash_flops, _flash_backward_flops, _addmm_in_place_flops):
    _rule._get_raw = True  # torch passes tensors, not shapes
_MISSING_IN_TORCH = {
    torch.ops.aten.addmm_: _addmm_in_place_flops,
    _FLASH: _flash_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward_flops,
}


def measured_step(request: Request) -> Measured:
    """Runs the step of a request for real: torch's provider, one AdamW step done before."""
    config = request.config()
    family = next(family for family in FAMILIES.values() if config.model_type in family.model_types)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = family.model_class(config).to(DTYPES[request.dtype])
    if request.base != DENSE:
        quantised = pytest.importorskip("mmpeft_fast.quantised")
        quantised.quantise(model, request.base)
    method = study_method(model, request.method, **request.settings)
    if request.implementation == "frozen":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    elif request.implementation == "peft":
        model, _ = add_baseline(model, method, train_connector="connector" in request.train)
    else:
        model = add_peft(model, method, train_connector="connector" in request.train)
        model = fuse(model, recompute=request.recompute)
    model.train()
    inputs = request.batch(config, Real().empty)
    if request.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs["use_cache"] = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained) if trained else None
    holder = nn.Module()
    holder.model = model
    with provider("torch"):
        if optimizer is not None:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        alive = [] if optimizer is None else [each for state in optimizer.state.values() for each in state.values()]
        if request.base != DENSE:
            alive += quantised.move_packed(model, lambda tensor: tensor)
        for i, tensor in enumerate(alive):
            holder.register_buffer(f"alive_{i}", tensor)
        with peak_bytes("cpu", holder) as peak:
            with saved_bytes(model) as saved:
                loss = model(**inputs).loss
            loss.backward()
            if optimizer is not None:
                optimizer.step()
        del loss
        # In a pass of its own: the counter's hooks keep what checkpointing would release.
        with FlopCounterMode(display=False, custom_mapping=_MISSING_IN_TORCH) as flops:
            model(**inputs).loss.backward()
    return Measured(saved.bytes, peak.bytes, flops.get_total_flops())
