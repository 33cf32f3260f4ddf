"""Adding PEFT parameters to a model, and fusing it: the only place where methods and families meet.

add_peft(model, method)   attaches a method's parameters, eager definition
fuse(model)               same parameters, same results, fused computation
unfuse(model)             back to what it was
"""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from mmpeft_fast import hf_peft
from mmpeft_fast.fusion import PREFIX, candidates, report_of
from mmpeft_fast.layers.causal_lm import FusedCausalLM
from mmpeft_fast.layers.class_swap import check_restorable, is_swapped, own_class, restore_class, swap_class
from mmpeft_fast.layers.decoder import FusedDecoderLayer, FusedRMSNorm
from mmpeft_fast.layers.graphless import Graphless
from mmpeft_fast.layers.graphs import LayerGraphs
from mmpeft_fast.layers.peft_linear import Bottleneck, PeftLinear, can_carry
from mmpeft_fast.layers.peft_norm import train_gain
from mmpeft_fast.layers.prefix import PrefixEncoder, attach_prefix
from mmpeft_fast.layers.shared_contexts import SharedContexts
from mmpeft_fast.layers.sites import is_packed_tensor, is_plain
from mmpeft_fast.layers.stacked_weights import owners, stack_linears, unstack
from mmpeft_fast.layers.tasks import TaskEmbedding, TaskGate, attach_tasks
from mmpeft_fast.methods import Method, make_method
from mmpeft_fast.models import Family, base_model, family_of
from mmpeft_fast.placement import BranchPlacement, Placement
from mmpeft_fast.verify import HEAD, Comparison, compare

__all__ = ["add_peft", "fuse", "is_fused", "study_method", "takes_hints", "unfuse", "verify_fused"]

_FUSED_CLASSES = {
    "decoder layers": FusedDecoderLayer,
    "final norm": FusedRMSNorm,
    "head and loss": FusedCausalLM,
    "vision tower": Graphless,
}
# Attributes that fuse puts on modules; unfuse removes them.
RECOMPUTE = (None, "gate_up", "qkv", "gate_up+qkv")
_FUSE_ATTRIBUTES = (
    "cache_idx",
    "context_calls",
    "decoder_path",
    "full_attention",
    "graphs",
    "has_own_forward",
    "image_token",
    "is_tail",
    "recompute",
    "keep_logits",
    "output_class",
    "paths",
    "reading",
    "refused",
    "said",
    "sparse_last_layer",
    "tower",
    "verified",
)
# What running a model on a batch raises where model and batch do not fit.
_UNRUNNABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)


def add_peft(model: nn.Module, method: Method, *, train_connector: bool = False) -> nn.Module:
    """Freezes the model and attaches a method's trainable parameters, in place.

    Base parameters keep their names; new ones lie beside them (`q_proj.branches.0.down`, `down_proj.in_scale`,
    `prefix_encoder.embedding.weight`), in at least float32. The method is noted as `model.peft_method`.

    Args:
        model: a transformers model of a known family, on any device (`meta` too).
        method: LoRA, IA3, Adapter, Prefix or LayerNorm.
        train_connector: also trains the modules between vision tower and decoder.

    Returns:
        The same model.

    Raises:
        ValueError: unknown family, PEFT parameters present already, a site that cannot carry a branch, no connector.
    """
    if not isinstance(method, Method):
        raise ValueError(f"add_peft: expected a method such as LoRA(r=16), got {method!r}")
    if model is not base_model(model):
        raise ValueError("add_peft: the model carries HF PEFT adapters already; expected a plain transformers model")
    hf_peft.register_readers()
    family = family_of(model)
    if train_connector:
        family.require_connector()
    decoder = family.decoder_of(model)
    if hasattr(model, "peft_method") or any(isinstance(module, PeftLinear) for module in decoder.modules()):
        raise ValueError("add_peft: the model carries PEFT parameters already; expected one without")
    if is_fused(model):
        raise ValueError("add_peft: the model is fused; call unfuse(model) first")
    placement, paths = method.place(family.paths.roles), family.paths
    if placement.prefix is not None and not isinstance(model, family.model_class):
        raise ValueError(
            f"add_peft: {type(model).__name__} cannot see a prefix; expected a {family.model_class.__name__} "
            "(load_pretrained)"
        )
    layers = family.layers_of(model)
    layers = [layers[idx] for idx in method.adapted_layers(len(layers))]
    sites = {role: [paths.at(layer, role) for layer in layers] for role in layer_roles(family, placement)}
    for role in (*placement.branches, *placement.scales):
        for linear in sites[role]:
            if not can_carry(linear):
                raise ValueError(
                    f"add_peft: role {role!r} is a {type(linear).__name__}; expected a plain torch.nn.Linear"
                )

    parts = set(placement.parts) | ({"connector"} if train_connector else set())
    check_trainable(model, family, parts)
    model.requires_grad_(False)
    task_gate = None
    if placement.tasks is not None:
        tasks = TaskEmbedding(placement.tasks, like=paths.norm_of(decoder).weight)
        task_gate = attach_tasks(model, decoder, tasks)
    _add_branches(sites, placement, task_gate)
    for role, where in placement.scales.items():
        for linear in sites[role]:
            PeftLinear.convert(linear).add_scale(where)
    for role in placement.gains:
        for norm in [paths.norm_of(decoder)] if role == "final_norm" else sites[role]:
            train_gain(norm)
    if placement.prefix is not None:
        _add_prefix(decoder, layers, family, placement)
    train_parts(model, family, parts)
    model.peft_method = method
    return model


def study_method(model: nn.Module, name: str, **overrides) -> Method:
    """A method with the study's settings for this model's family, some of them changed.

    Raises:
        ValueError: unknown family, method, setting or value.
    """
    return make_method(name, **dict(family_of(model).method_settings.get(name, {})) | overrides)


def layer_roles(family: Family, placement: Placement) -> list[str]:
    """The roles of a decoder layer that a placement touches. Raises ValueError where the family lacks one."""
    wanted = [*placement.branches, *placement.scales, *(role for role in placement.gains if role != "final_norm")]
    unknown, known = [role for role in wanted if role not in family.paths.roles], list(family.paths.roles)
    if unknown:
        raise ValueError(f"family {family.name!r} has no roles {unknown}; expected roles in {known}")
    return list(dict.fromkeys(wanted))


def part_modules(model: nn.Module, family: Family, parts: set[str]) -> list[nn.Module]:
    """The modules of whole parts (`placement.PARTS`), in that order."""
    modules = family.modules_at(model, family.connector) if "connector" in parts else []
    if "embeddings" in parts:
        modules.append(model.get_input_embeddings())
    if "head" in parts:
        modules.append(model.get_output_embeddings())
    return modules


def train_parts(model: nn.Module, family: Family, parts: set[str]) -> None:
    """Lets whole parts be trained. Raises ValueError as `check_trainable`."""
    check_trainable(model, family, parts)
    for module in part_modules(model, family, parts):
        module.requires_grad_(True)


def check_trainable(model: nn.Module, family: Family, parts: set[str]) -> None:
    """Raises ValueError for a part whose weights are stored as integers, as those of quantised layers are."""
    for module in part_modules(model, family, parts):
        for name, parameter in module.named_parameters():
            if is_packed_tensor(parameter):
                stored = parameter.dtype if is_plain(parameter) else type(parameter.data).__name__
                raise ValueError(
                    f"{type(module).__name__}: expected floating-point weights to train, got {name} quantised to "
                    f"{stored}; leave that layer out when quantising (llm_int8_skip_modules)"
                )


def _add_branches(sites: Mapping[str, list[nn.Linear]], placement: Placement, task_gate: TaskGate | None) -> None:
    """The branches of every role; tied ones are one parameter in several places."""
    sizes = [(each.in_features, each.out_features) for role in placement.branches for each in sites[role]]
    widths = tuple(map(max, zip(*sizes, strict=True)))
    pairs: dict[tuple[int, int], Bottleneck] = {}  # of all roles, by rank and seed
    for role in placement.branches:
        for branch in placement.branches_of(role):
            if branch.projection_seed is None:
                _add_branch(sites[role], branch, task_gate if branch.experts else None)
                continue
            for linear in sites[role]:
                key = branch.rank, branch.projection_seed
                added = PeftLinear.convert(linear).add_branch(branch, shared=pairs.get(key), widths=widths)
                pairs.setdefault(key, added)


def _add_branch(linears: list[nn.Linear], branch: BranchPlacement, task_gate: TaskGate | None) -> None:
    """A branch on each layer's linear of one role."""
    added = [PeftLinear.convert(linear).add_branch(branch, task_gate=task_gate) for linear in linears]
    for name, shared in (("down", branch.down_layers), ("up", branch.up_layers)):
        count = shared or len(added)
        for idx, each in enumerate(added):
            setattr(each, name, getattr(added[idx - idx % count], name))


def _add_prefix(decoder: nn.Module, layers: list[nn.Module], family: Family, placement: Placement) -> None:
    config, paths = decoder.config, family.paths
    attentions = [paths.attention_of(layer) for layer in layers]
    encoder = PrefixEncoder(
        placement.prefix,
        num_layers=len(attentions),
        num_kv_heads=config.num_key_value_heads,
        head_dim=attentions[0].head_dim,
        hidden_size=config.hidden_size,
        like=paths.norm_of(decoder).weight,
    )
    attach_prefix(decoder, attentions, encoder)


def fuse(
    model: nn.Module,
    *,
    keep_logits: bool = False,
    strict: bool = False,
    verify: bool | Mapping[str, Any] = False,
    cuda_graphs: bool = False,
    recompute: str | None = None,
    share_contexts: bool = False,
) -> nn.Module:
    """Replaces the computation of decoder, norms, head and loss by the fused one, in place.

    No parameter is created, replaced or renamed. Weights that share an input (q, k, v; gate, up) become rows of one
    buffer where nobody else holds their memory; fuse after moving the model to its device and before sharding it.

    In training with labels the fused model takes its loss from the token-sparse tail and returns `logits=None`;
    everything else returns what it did before. What cannot be fused stays as it was and works as before: one warning
    counts and names it, and `fuse_report(model)` says what is fused, what is not, and why.

    Args:
        model: a transformers model of a known family, with `add_peft` parameters or without, or a model that HF PEFT
            has prepared. Any device, `meta` and fake tensors too.
        keep_logits: training forward passes return full logits.
        strict: what cannot be fused is an error, and the model is then unchanged.
        cuda_graphs: training passes of decoder layers are recorded as CUDA graphs in the third step of a shape and
            replayed from then on (`layers.graphs`), where nothing forbids it: `fuse_report` says what did. The same
            bits for less of the host's time. A gradient that is kept beyond `zero_grad` has to be cloned.
        recompute: "gate_up": the outputs of gate and up (nearly half of what is kept for the backward) are not kept but
            made again in the backward, by one more GEMM a layer; "qkv": those of q, k and v (of separate projections);
            "gate_up+qkv". The same gradients bit for bit. None: nothing is made again.
        share_contexts: rows of a batch that begin alike (and show the same image) compute that once, whoever calls the
            model and whatever reads its hidden states: two answers to a prompt in TRL's DPOTrainer, completions of one
            prompt. Needs token ids, `use_cache=False` and no `position_ids`; `fuse_report` counts the calls. The same
            result; with dropout, shared tokens share their masks.
        verify: then compares the fused model with itself unfused on a few tokens (`verify_fused`): True makes them, or
            a training batch with labels.

    Returns:
        The same model. Fusing again is harmless and takes in what has become fusable; `keep_logits`, `cuda_graphs`,
        `recompute` and `share_contexts` of the last call count.

    Raises:
        ValueError: not a module, another `recompute`; `share_contexts` for a family whose rows cannot be documents;
            with `strict`, something cannot be fused or computes something else; a publisher's model (Qwen-VL) with a
            layer that cannot be.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"fuse: expected a model, got {type(model).__name__}")
    if recompute not in RECOMPUTE:
        raise ValueError(f"fuse: expected recompute to be one of {list(RECOMPUTE)}, got {recompute!r}")
    base = base_model(model)
    try:
        family = family_of(base)
    except ValueError as error:
        if strict:
            raise
        warnings.warn(f"fuse: nothing is fused: {error}", stacklevel=2)
        return model
    if share_contexts:
        _check_contexts(base, family)
    found = candidates(model, family)
    is_publishers = not issubclass(own_class(base), family.model_class)
    refused = [seen for seen in found if seen.reason is not None]
    if refused:
        message = f"fuse: {report_of(found).summary()}"
        # The publisher's layers cannot run inside this package's decoder.
        if strict or (is_publishers and any(seen.part in _FUSED_CLASSES for seen in refused)):
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    if not isinstance(base, family.model_class):
        family.adopt(base)

    paths, decoder, layers = family.paths, family.decoder_of(base), family.layers_of(base)
    fusable = {id(seen.module) for seen in found if seen.reason is None}
    owned = owners(model)
    graphs = LayerGraphs() if cuda_graphs else None
    parts = () if recompute is None else tuple(recompute.split("+"))
    for layer_idx, layer in enumerate(layers):
        if id(layer) in fusable:
            for roles in (paths.projections, ("gate", "up"), ("down",)):
                stack_linears([paths.at(layer, role) for role in roles], owned)
            layer.paths, layer.cache_idx, layer.has_own_forward = paths, layer_idx, not is_publishers
            layer.is_tail, layer.graphs, layer.recompute = layer is layers[-1], graphs, parts
    for seen in found:
        if seen.reason is None and seen.part in _FUSED_CLASSES:
            swap_class(seen.module, _FUSED_CLASSES[seen.part])
            if seen.part == "vision tower":
                seen.module.tower = tuple(family.modules_at(base, family.vision_tower))
    if is_swapped(base):
        base.keep_logits = keep_logits
        base.output_class = family.output_class
        base.sparse_last_layer = family.sparse_last_layer(base.config) and is_swapped(layers[-1])
        base.full_attention = family.full_attention(base)
    is_prefix = any(seen.part == PREFIX and seen.reason is None for seen in found)
    if is_prefix or is_swapped(base):
        base.paths, base.decoder_path = paths, family.decoder
    if is_prefix:
        hf_peft.fuse_prefix(model, decoder)
    below_head = base.base_model
    if share_contexts:
        swap_class(below_head, SharedContexts)
        below_head.paths, below_head.image_token = paths, getattr(base.config, "image_token_id", None)
        below_head.merge_size = getattr(getattr(base.config, "vision_config", None), "spatial_merge_size", None)
        below_head.decoder_path = family.decoder.removeprefix(base.base_model_prefix).removeprefix(".")
    elif isinstance(below_head, SharedContexts):
        _unfuse_module(below_head)
    if verify is not False:
        verify_fused(model, None if verify is True else verify, strict=strict)
    return model


def _check_contexts(base: nn.Module, family: Family) -> None:
    reason = family.why_not_packed
    if reason is None and not family.full_attention(base):
        reason = "its attention's window slides"
    if reason is None and not isinstance(base, family.model_class):
        reason = f"a {type(base).__name__} has no {family.model_class.base_model_prefix} below its head"
    if reason is not None:
        raise ValueError(f"fuse: expected share_contexts=False for family {family.name!r}: {reason}")


def verify_fused(model: nn.Module, batch: Mapping[str, Any] | None = None, *, strict: bool = False) -> None:
    """Compares a fused model with itself unfused (`verify.compare`) and unfuses what differs, with one warning.

    What was found stays in `fuse_report(model)` until `unfuse(model)`, also that nothing could be compared and why: the
    model is then fused as before. Nothing else about the model changes, nor do torch's generators.

    Args:
        model: a fused model, or what HF PEFT wraps around one; of another nothing is said.
        batch: a training batch with labels; a few tokens do. None: made for the model.
        strict: what differs is an error, and the model is then unfused.

    Raises:
        ValueError: with `strict`, something differs.
    """
    if not is_fused(model):
        return
    base, reasons = base_model(model), {}
    for is_last in (False, True):  # what was alone to differ is unfused; if that does not mend it, everything is
        try:
            found = compare(model, batch)
        except _UNRUNNABLE as error:
            base.verified = f"not compared: {' '.join(str(error).split())[:300] or type(error).__name__}"
            break
        base.verified = found.summary()
        if found.differing and strict:
            unfuse(model)
            raise ValueError(f"fuse: {found.differing[0].layer}, {found.differing[0]}")
        if found.differing:
            reasons |= _refuse(model, found, everything=is_last)
        if not found.differing or not is_fused(model):
            break
    if reasons:
        base.verified = f"{len(reasons)} modules computed something else and run unfused"
        more = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        warnings.warn(f"fuse: {base.verified}: {more}", stacklevel=3)


def _refuse(model: nn.Module, found: Comparison, *, everything: bool) -> dict[str, str]:
    """Unfuses what differs; why, by dotted name. What is not a module's own (a prefix, embeddings) is all layers'."""
    base, family = base_model(model), family_of(base_model(model))
    fused = {seen.fqn: seen for seen in candidates(model, family) if is_swapped(seen.module)}
    reasons: dict[str, str] = {}
    for row in found.differing:
        name = type(base).__name__ if row.part == HEAD else row.layer
        everything = everything or name not in fused
        reasons.setdefault(name, f"verify: {row}")
    is_whole = not issubclass(own_class(base), family.model_class) or hf_peft.has_prefix(model)
    if everything or is_whole:  # a publisher's layers, and a prefix of HF PEFT, are fused together or not at all
        first = next(iter(reasons.values()))
        reasons = {name: reasons.get(name, first) for name in fused}
        earlier = [(module, module.refused) for module in model.modules() if "refused" in module.__dict__]
        unfuse(model)
        for module, reason in earlier:
            module.refused = reason
    for name, reason in reasons.items():
        _unfuse_module(fused[name].module)
        fused[name].module.refused = reason
    if is_swapped(base) and not is_swapped(family.layers_of(base)[-1]):
        base.sparse_last_layer = False
    return reasons


def _unfuse_module(module: nn.Module) -> None:
    restore_class(module)
    for name in _FUSE_ATTRIBUTES:
        module.__dict__.pop(name, None)


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes `fuse`, in place; PEFT parameters stay. A model that is not fused is returned as it is.

    Raises:
        ValueError: a module has a class that was derived from its fused one; nothing is changed then.
    """
    for module in model.modules():
        check_restorable(module)
    hf_peft.unfuse_prefix(model)
    for module in model.modules():
        if is_swapped(module) or "refused" in module.__dict__:
            _unfuse_module(module)
    unstack(model)
    base_model(model).__dict__.pop("verified", None)
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` has changed anything in the model."""
    return any(is_swapped(module) for module in base_model(model).modules())


def takes_hints(model: nn.Module) -> bool:
    """Whether the model's forward knows the keywords of `FusedCausalLM` that spare host synchronisations."""
    return is_swapped(base_model(model))
