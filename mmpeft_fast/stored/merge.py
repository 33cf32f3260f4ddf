"""Folding trained parameters into the weights: what remains is a plain model that computes the same.

W' = diag(l_out) (W + sum s U D) diag(l_in),  b' = l_out * b;  gains take the place of a norm's own. A magnitude is
l_out = m / |W + sum s U D| and leaves b.
"""

import logging
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from mmpeft_fast.atomic import new_folder, recover
from mmpeft_fast.hf_peft import register_readers
from mmpeft_fast.layers.peft_linear import Bottleneck, PeftLinear
from mmpeft_fast.layers.peft_norm import WideGain
from mmpeft_fast.layers.sites import LinearSite, read_linear, read_norm
from mmpeft_fast.models import base_model, family_of
from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.ops.packed import PackedWeight
from mmpeft_fast.peft_model import unfuse
from mmpeft_fast.stored.slots import drop_peft, forget_method, read_carried

__all__ = ["merge_peft"]

logger = logging.getLogger(__name__)

_PREFIX = "a prefix cannot be merged: its keys and values stand beside those of the tokens, in no weight"


class _Fold(NamedTuple):
    """A plain module of the base model and what is to go into its weight."""

    name: str
    module: nn.Module
    site: LinearSite | Tensor
    """A linear's branches and scales, or a norm's gain."""


def merge_peft(model: nn.Module, folder: str | Path | None = None, *, dequantise: bool = False) -> nn.Module:
    """Folds LoRA and its kin, IA3 and tuned norms into the weights, in place: the model is then a plain one, frozen.

    Sums and products are formed in at least float32 and rounded once, to the weight's dtype.

    Args:
        model: with `add_peft` parameters, or a `PeftModel` (its active adapters); fused or not.
        folder: also saves the merged model there, whole or not at all, for transformers' `from_pretrained`.
        dequantise: quantised weights, into which nothing can be folded without changing it, become dense ones of the
            model's dtype, all of them. How much of what the parameters change is lost as the sums are rounded to that
            dtype is logged, and how much would be lost if they were quantised again, as HF PEFT does.

    Returns:
        The transformers model (of a `PeftModel` its base model), not fused.

    Raises:
        ValueError: no PEFT parameters, a method that cannot be merged, a weight that another module shares or that is
            quantised (without `dequantise`), or a `folder` with something in it. The model is then unchanged.
    """
    folder = None if folder is None else recover(Path(folder))
    if folder is not None and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"merge_peft: expected a new or empty folder, got {folder}")
    base = base_model(model)
    folds = _of_peft_model(model) if isinstance(model, PeftModel) else _of_added(model)
    _check_unshared(base, folds)
    packed = [fold for fold in folds if isinstance(fold.site, LinearSite) and _is_packed(fold.site)]
    if packed and not dequantise:
        name, _, site = packed[0]
        raise ValueError(
            f"merge_peft: expected dense weights or dequantise=True, {name} is in {site.segment.weight.name}"
        )
    if dequantise:
        _check_dequantisable(packed)

    unfuse(model)
    with torch.no_grad():
        if dequantise:
            folds = _dequantised(base, folds, packed)
        for fold in folds:
            if isinstance(fold.site, LinearSite):
                fold.module.weight.copy_(_folded(fold.module.weight, fold.site))
                _fold_bias(fold.module, fold.site)
            else:
                fold.module.weight.copy_(fold.site)
    if isinstance(model, PeftModel):
        _unload(base)
    else:
        _drop_added(base)
    base.requires_grad_(False)
    if folder is not None:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as temporary:
            base.save_pretrained(temporary)
    return base


def _of_added(model: nn.Module) -> list[_Fold]:
    """What `add_peft` has put on a model; a tuned norm holds its gain already."""
    carried = read_carried(model)
    if carried is None:
        raise ValueError(f"merge_peft: expected a model with PEFT parameters, got a plain {type(model).__name__}")
    if carried.method.place(family_of(model).paths.roles).prefix is not None:
        raise ValueError(f"merge_peft: {_PREFIX}")
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, PeftLinear)]
    for name, linear in linears:
        for branch in linear.branches:
            _check_foldable(name, branch)
    return [_Fold(name, linear, _read(name, linear)) for name, linear in linears]


def _check_foldable(name: str, branch: nn.Module) -> None:
    """Raises ValueError unless a branch is s U D beside the layer."""
    if type(branch) is not Bottleneck:
        raise ValueError(f"merge_peft: {name} has a branch of type {type(branch).__name__}, which may be no linear one")
    placement = branch.placement
    if placement.activation != "identity":
        raise ValueError(
            f"merge_peft: {name} has a branch that cannot be merged: {placement.activation} makes it nonlinear; "
            "expected activation 'identity'"
        )
    if placement.experts:
        raise ValueError(f"merge_peft: {name} has a branch that cannot be merged: a sample's task weights its experts")
    if placement.position != "parallel":
        raise ValueError(
            f"merge_peft: {name} has a branch that cannot be merged: its position is {placement.position!r}; "
            "expected 'parallel'"
        )


def _of_peft_model(model: PeftModel) -> list[_Fold]:
    """HF PEFT's layers, their active adapters."""
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(f"merge_peft: {_PREFIX}")
    register_readers()
    folds = []
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.disable_adapters:
            raise ValueError("merge_peft: expected enabled adapters, they are disabled")
        plain = module.get_base_layer()
        try:
            site = read_norm(module)[0] if isinstance(module, LNTuningLayer) else read_linear(module)
        except ValueError as error:
            raise ValueError(f"merge_peft: cannot merge {name}: {error}; its merge_and_unload may") from error
        if isinstance(site, LinearSite) and site.segment.bias is not plain.bias:
            raise ValueError(
                f"merge_peft: {name} has a bias computed from an adapter's parameters; expected lora_bias=False, and "
                "DoRA on layers without a bias"
            )
        folds.append(_Fold(name, plain, site))
    return folds


def _read(name: str, linear: nn.Module) -> LinearSite:
    try:
        return read_linear(linear)
    except ValueError as error:
        raise ValueError(f"merge_peft: cannot merge {name}: {error}") from error


def _folded(weight: Tensor, site: LinearSite) -> Tensor:
    """W' in at least float32."""
    wide, segment = accumulate_dtype(weight.dtype), site.segment
    weight = weight.to(wide)
    for branch in segment.branches:
        weight = torch.addmm(weight, branch.up.to(wide), branch.down.to(wide), alpha=branch.scaling)
    if segment.out_scale is not None:
        weight = weight * segment.out_scale.to(wide)[:, None]
    return weight if site.in_scale is None else weight * site.in_scale.to(wide)


def _fold_bias(linear: nn.Linear, site: LinearSite) -> None:
    # A bias that was computed is divided by the scale, and stands beside it (a magnitude).
    if linear.bias is not None and site.segment.bias is linear.bias and site.segment.out_scale is not None:
        wide = accumulate_dtype(linear.weight.dtype)
        linear.bias.copy_(linear.bias.to(wide) * site.segment.out_scale.to(wide))


def _is_packed(site: LinearSite) -> bool:
    return isinstance(site.segment.weight, PackedWeight)


def _check_dequantisable(packed: list[_Fold]) -> None:
    """Raises ValueError where a fold's weight is in a format that nothing here makes a dense layer of."""
    expected = "merge_peft: dequantise=True expects a model that bitsandbytes quantised"
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{expected}, it is not installed")
    from mmpeft_fast import quantised

    for name, _, site in packed:
        if site.segment.weight.name not in quantised.FORMATS:
            raise ValueError(f"{expected}, {name} is in {site.segment.weight.name}")


def _dequantised(base: nn.Module, folds: list[_Fold], packed: list[_Fold]) -> list[_Fold]:
    """Makes the model dense, says what merging costs, and returns the folds with the modules that are there now."""
    from mmpeft_fast import quantised  # needs what the model was quantised with

    dtype = base.dtype
    change = rounded = again = 0.0
    for fold in packed:
        weight = fold.site.segment.weight
        before = weight.dense(weight.dtype or dtype).float()
        merged = _folded(before, fold.site)
        change += float((merged - before).square().sum())
        rounded += float((merged.to(dtype).float() - merged).square().sum())
        again += float((quantised.packed_again(merged, fold.module) - merged).square().sum())
    if change:
        logger.warning(
            "merge_peft: rounding the merged weights to %s loses %.2g of what the parameters change (norm of the error "
            "over that of the change, all layers); quantised to %s again they would lose %.2g",
            str(dtype).removeprefix("torch."), (rounded / change) ** 0.5, packed[0].site.segment.weight.name,
            (again / change) ** 0.5,
        )  # fmt: skip
    dense = quantised.dequantise(base, dtype)
    return [fold._replace(module=dense.get(fold.module, fold.module)) for fold in folds]


def _check_unshared(base: nn.Module, folds: list[_Fold]) -> None:
    """Raises ValueError where a weight to fold into is used in a second place, which would change as well."""
    uses = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    for fold in folds:
        if uses[id(fold.module.weight)] > 1:
            raise ValueError(f"merge_peft: expected {fold.name} to have a weight of its own, another module shares it")


def _drop_added(model: nn.Module) -> None:
    """Gives every module its own class, and widened gains the dtype of the weights around them."""
    family = family_of(model)
    dtype = family.paths.at(family.layers_of(model)[0], family.paths.projections[0]).weight.dtype
    for module in model.modules():
        if isinstance(module, WideGain):
            module.weight = nn.Parameter(module.weight.detach().to(dtype))
        drop_peft(module)
    forget_method(model)


def _unload(base: nn.Module) -> None:
    """Puts plain modules in the place of HF PEFT's."""
    for name, module in list(base.named_modules(remove_duplicate=False)):
        if isinstance(module, BaseTunerLayer):
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, plain)
    base.__dict__.pop("peft_config", None)
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    # Copies that HF PEFT trained apart from each other are no longer tied.
    if head is not None and base.config.tie_word_embeddings and head.weight is not embeddings.weight:
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
