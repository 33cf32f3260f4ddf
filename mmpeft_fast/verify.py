"""The fused computation against the model's own, part by part, on a few tokens: loss, outputs and all gradients.

    print(compare(model, batch))    # a table by layer

A model runs three times on a batch: with its own computation (*eager*), with its own in float64 (the *truth*, one part
at a time: no more than one part's weights exist in float64), and fused. In the second and third run every part gets
the very inputs and the very output gradients that it had in the first, whatever the parts around it return. So errors
do not add up over layers, a difference belongs to the part it is named with, and the rule of `closeness` applies to
each as if it ran alone, with twice as much allowed: err(fused, truth) <= 2 (2 err(eager, truth) + floor). Where a
result hangs on a few terms, two errors as good as each other can still be far apart by chance. So what differs by no
more than rounding can explain is looked at again from embeddings a little off, whose roundings are others: it differs
where it does so at every look.

Dropout is taken as zero in all runs. Padding is not compared. Autocast is off.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from mmpeft_fast.closeness import allowed_error, allowed_in_double, floor, relative_error
from mmpeft_fast.documents import with_dense_mask
from mmpeft_fast.fusion import Candidate, candidates
from mmpeft_fast.layers.causal_lm import supervised_targets
from mmpeft_fast.layers.class_swap import is_swapped, own_class
from mmpeft_fast.layers.graphless import Graphless
from mmpeft_fast.layers.peft_linear import PeftLinear
from mmpeft_fast.layers.sites import Unfusable, is_plain, packed_weights
from mmpeft_fast.models import base_model, family_of
from mmpeft_fast.ops.packed import PackedWeight
from mmpeft_fast.ops.rows import take_rows
from mmpeft_fast.placement import ATTENTION_ROLES, MLP_ROLES
from mmpeft_fast.small_batches import made_batches

__all__ = ["Comparison", "Row", "as_unfused", "compare"]

_LAYERS, _NORM, _TOWER, HEAD = "decoder layers", "final norm", "vision tower", "head and loss"
_PROBED = (_LAYERS, _NORM, _TOWER)
_INPUT, _OUTPUT = "input", "output"
_PART_OF_ROLE = dict.fromkeys((*ATTENTION_ROLES, "qkv"), "attention") | dict.fromkeys(MLP_ROLES, "mlp")
# Errors of gradients of a few tokens scatter: one in 90 small float32 models went beyond the rule itself, by a tenth,
# and what differs is unfused. What is wrong is off by orders of magnitude.
_MARGIN = 2
# Looks at most, and beyond how many times what is allowed one is enough.
_LOOKS, _BEYOND_CHANCE = 4, 30
# How far embeddings are off at a further look, relative to themselves.
_OFF = 2**-6
_HINTS = ("supervised_capacity", "right_padded")  # keywords that the model's own forward does not know


class Row(NamedTuple):
    """One comparison. layer: dotted name of the module that `fuse` has given another class, or of what holds the
    parameter where that is outside. part: attention, mlp, norm, ... `difference`, `allowed`: relative to the truth."""

    layer: str
    part: str
    what: str
    difference: float
    allowed: float
    is_fused: bool = True

    @property
    def differs(self) -> bool:
        return not self.difference <= self.allowed

    @property
    def share(self) -> float:
        """The difference as a share of what is allowed."""
        return math.inf if math.isnan(self.difference) else self.difference / self.allowed if self.allowed else 0.0

    def __str__(self) -> str:
        return f"{self.part}: {self.what} differs by {self.difference:.2g} of allowed {self.allowed:.2g}"


@dataclass(frozen=True)
class Comparison:
    """`print` it: a table by layer and part, each with what comes closest to being wrong. tokens: how many were run,
    `passes` times forward and backward."""

    rows: tuple[Row, ...]
    tokens: int
    passes: int

    @property
    def differing(self) -> list[Row]:
        return [row for row in self.rows if row.differs]

    def summary(self) -> str:
        """One sentence."""
        compared = [row for row in self.rows if row.is_fused]
        extent = f"{len(compared)} outputs and gradients of {self.tokens} tokens"
        if self.differing:
            return f"{len(self.differing)} of {extent} differ"
        worst = max(compared, key=lambda row: row.share, default=None)
        if worst is None:
            return "nothing is fused"
        return f"{extent} agree; the farthest is at {worst.share:.0%} of what is allowed ({worst.layer}, {worst.what})"

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.layer, row.part), []).append(row)
        table = [("layer", "part", "compared", "farthest", "difference", "allowed", "")]
        for (layer, part), rows in groups.items():
            if not rows[0].is_fused:
                table.append((layer, part, "-", rows[0].what, "-", "-", "not fused"))
                continue
            wrong = [row for row in rows if row.differs]
            for row in wrong or [max(rows, key=lambda row: row.share)]:
                verdict = "DIFFERS" if row.differs else "agrees"
                numbers = f"{row.difference:.2g}", f"{row.allowed:.2g}"
                table.append((layer, part, str(len(rows)), row.what, *numbers, verdict))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join(line.rstrip() for line in [*lines, self.summary()])


@contextlib.contextmanager
def as_unfused(model: nn.Module) -> Iterator[nn.Module]:
    """The same modules, parameters and hooks with their own computation for a while."""
    swapped = [(module, type(module)) for module in model.modules() if is_swapped(module)]
    for module, _ in swapped:
        module.__class__ = own_class(module)
    try:
        yield model
    finally:
        for module, kind in swapped:
            module.__class__ = kind


def compare(model: nn.Module, batch: Mapping[str, Any] | None = None) -> Comparison:
    """Compares what is fused in a model with the same modules unfused, on a training batch.

    The model, its gradients, modes, buffers and torch's generators are as before afterwards. Costs one forward and
    backward pass fused, one unfused, and one in float64 whose forward runs twice; up to four times as much where
    something differs.

    Args:
        model: a fused model, or what HF PEFT wraps around one.
        batch: keyword arguments of the model with `labels`, on any device; a few tokens do (`cut_batch`). None: two
            batches of random tokens that suit the model (`made_batches`).

    Raises:
        ValueError: the model is not fused, has no values to compute with, the batch has no labels, or the unfused
            model's own loss is not finite.
    """
    base = base_model(model)
    if not any(is_swapped(module) for module in base.modules()):
        raise ValueError("compare: expected a fused model; call fuse(model) first")
    device = _device_of(model)
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
    batches = made_batches(base.config, dtype) if batch is None else [batch]
    rows, tokens = [], 0
    for each in batches:
        if not isinstance(each.get("labels"), Tensor):
            raise ValueError("compare: expected a batch with labels, which give the loss")
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in each.items()}
        rows += _looked_at(model, moved)
        tokens += each["labels"].numel()
    worst: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = row[:3]
        worst[key] = max(worst.get(key, row), row, key=lambda row: row.share)
    layers = list(dict.fromkeys(row.layer for row in rows))
    order = {"output": 0, "gradient of the input": 1}
    ordered = sorted(worst.values(), key=lambda row: (layers.index(row.layer), order.get(row.what, len(order))))
    return Comparison(tuple(ordered), tokens, 1 if dtype == torch.float64 else 3)


def _looked_at(model: nn.Module, batch: dict[str, Any]) -> list[Row]:
    """The rows of a batch: of what differs that of the look at which it did so least."""
    rows = {(row.layer, row.what): row for row in _Run(model, batch).rows()}
    for look in range(1, _LOOKS):
        doubtful = [key for key, row in rows.items() if row.differs]
        if not doubtful or any(rows[key].share > _BEYOND_CHANCE for key in doubtful):
            break
        again = {(row.layer, row.what): row for row in _Run(model, batch, look).rows()}
        rows |= {key: min(rows[key], again[key], key=lambda row: row.share) for key in doubtful}
    return list(rows.values())


def _device_of(model: nn.Module) -> torch.device:
    """The device that all tensors of a model are on. Raises ValueError where there is not one, or no values."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors):
        raise ValueError("its tensors have no values (meta device, fake or offloaded)")
    if any(type(tensor).__name__ in ("DTensor", "FlatParameter") for tensor in tensors):
        raise ValueError("its tensors are sharded")
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) != 1:
        raise ValueError(f"its tensors lie on {', '.join(devices)}; expected one device")
    return torch.device(devices[0])


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever a forward pass leaves behind in modules, buffers and generators is taken back. Inside, nothing draws
    dropout and nothing is checkpointed: only what holds the decoder's layers is in training mode."""
    base = base_model(model)
    states = [_State(module) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    layers = set(family_of(base).layers_of(base))
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            # What wraps a fused class's forward later (mixed precision) is no part of the comparison.
            base.__dict__.pop("forward", None)
            for module in model.modules():
                # A linear layer with a packed weight may compute something else in evaluation.
                holds_layers = module not in layers and not layers.isdisjoint(module.modules())
                module.training = holds_layers or isinstance(module, nn.Linear)
            yield
    finally:
        for state in states:
            state.restore()
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


class _State:
    """The attributes of a module and the entries of dicts among them: hooks, buffers, what a forward pass notes."""

    def __init__(self, module: nn.Module):
        self.attributes, self.kept = module.__dict__, dict(module.__dict__)
        self.entries = [(value, dict(value)) for value in self.kept.values() if isinstance(value, dict)]

    def restore(self) -> None:
        for now, before in ((self.attributes, self.kept), *self.entries):
            if now.keys() != before.keys() or any(now[key] is not value for key, value in before.items()):
                now.clear()
                now.update(before)


@dataclass
class _Pass:
    """What one run saw: values and gradients by place (part, "input" or "output"), the loss, gradients of parameters by
    name. leaves: inputs of the first layer that were made to require grad."""

    values: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    grads: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    parameters: dict[str, Tensor | None] = field(default_factory=dict)
    leaves: list[Tensor] = field(default_factory=list)


class _Probe(torch.autograd.Function):
    """Notes the value that passes a place and the gradient that comes back, and lets others pass in their stead."""

    @staticmethod
    def forward(ctx, x, place, seen, value, grad):
        ctx.place, ctx.seen, ctx.grad = place, seen, grad
        seen.values[place] = x.detach()
        return (x if value is None else value).clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.grads[ctx.place] = grad
        return grad if ctx.grad is None else ctx.grad, None, None, None, None


class _ForwardOf(nn.Module):
    """Calls the forward of a module's class and none of its hooks, so that parameters can be exchanged around it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return type(self.inner).forward(self.inner, *args, **kwargs)


def _double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _run_in_double(module: nn.Module, *args, **kwargs):
    """A module's own forward with all its tensors in float64, which exist while it runs only: its backward runs it
    again."""
    cache = kwargs.get("past_key_values")
    kept = [(entry, dict(entry.__dict__)) for entry in getattr(cache, "layers", ())]
    tensors = {f"inner.{name}": tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    packed = packed_weights(module)

    def run(args, kwargs):
        for entry, state in kept:
            entry.__dict__.update(state)
        wide = {name: _double(tensor) for name, tensor in tensors.items()}
        with contextlib.ExitStack() as stack:
            for linear, weight in packed.items():
                stack.enter_context(_multiplies_in_double(linear, weight))
            return torch.func.functional_call(_ForwardOf(module), wide, args, kwargs)

    args, kwargs = tree_map(_double, (args, kwargs))
    return checkpoint(run, args, kwargs, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def _multiplies_in_double(linear: nn.Linear, weight: PackedWeight) -> Iterator[None]:
    """Inside, a layer with a packed weight computes W h + b in float64. W is what the layer's own forward makes of the
    identity, not what the fused code unpacks."""
    own = linear.plain if isinstance(linear, PeftLinear) else type(linear)

    def product(self, h: Tensor) -> Tensor:
        bias, self._parameters["bias"] = self.bias, None
        try:
            with torch.no_grad():
                identity = torch.eye(weight.shape[1], dtype=weight.dtype or torch.float32, device=h.device)
                columns = own.forward(self, identity)
        finally:
            self._parameters["bias"] = bias
        return nn.functional.linear(h, columns.t().double(), None if bias is None else bias.double())

    # Where the product is looked up: inside a PeftLinear's forward, or as the layer's own.
    name, value = "forward", functools.partial(product, linear)
    if isinstance(linear, PeftLinear):
        name, value = "plain", type("InDouble", (), {"forward": product})
    linear.__dict__[name] = value
    try:
        yield
    finally:
        del linear.__dict__[name]


class _Run:
    """The comparison on one batch."""

    def __init__(self, model: nn.Module, batch: dict[str, Any], look: int = 0):
        self.model, self.base, self.look = model, base_model(model), look
        self.paths, self.batch = family_of(self.base).paths, {"use_cache": False, **batch}
        self.found = candidates(model, family_of(self.base))
        self.parts = [part for part in self.found if part.part in _PROBED and is_swapped(part.module)]
        self.first_layer = family_of(self.base).layers_of(self.base)[0]
        labels, mask = batch["labels"], batch.get("attention_mask")
        is_padding_mask = isinstance(mask, Tensor) and mask.shape == labels.shape
        self.real = mask.bool() if is_padding_mask else torch.ones_like(labels, dtype=torch.bool)
        self.rows_of_tail = supervised_targets(labels, batch.get("supervised_capacity"))[0]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        names |= {id(parameter): name for name, parameter in self.base.named_parameters()}
        self.trained = {names[id(p)]: p for p in model.parameters() if p.requires_grad}
        self.calls: dict[str, list[tuple[tuple, dict]]] = {}  # of each layer in each run
        self.is_double = all(p.dtype == torch.float64 for p in self.base.parameters() if p.is_floating_point())

    def rows(self) -> list[Row]:
        unfused = with_dense_mask({name: value for name, value in self.batch.items() if name not in _HINTS})
        widened = [part.module for part in self.parts if _can_be_widened(part.module)]
        head = self.base.get_output_embeddings()
        if head is not None and _can_be_widened(head):
            widened.append(head)
        with _undisturbed(self.model, self.batch["labels"].device):
            with as_unfused(self.model):
                eager = self._pass(unfused)
                if not eager.loss.isfinite().all():
                    raise ValueError(f"the unfused model's loss is {eager.loss.item()} on the batch")
                truth = eager if self.is_double else self._pass(unfused, eager, widened)
            fused = self._pass(self.batch, eager)
            return list(self._compared(eager, truth, fused))

    def _pass(self, batch: dict[str, Any], eager: _Pass | None = None, widened: Sequence[nn.Module] = ()) -> _Pass:
        """Runs the model forward and backward, with the eager run's values and gradients at every place."""
        seen, handles = _Pass(), []
        head_is_wide = self.base.get_output_embeddings() in widened
        try:
            if self.look:
                handles.append(self.base.get_input_embeddings().register_forward_hook(self._a_little_off))
            for part in self.parts:
                handles += self._probe(part, seen, eager, part.module in widened, head_is_wide)
            for module in widened:
                module.__dict__["forward"] = functools.partial(_run_in_double, module)
            loss = self.model(**batch).loss
            seen.loss = loss.detach()
            sources = [*self.trained.values(), *seen.leaves]
            if loss.requires_grad and sources:
                grads = torch.autograd.grad(loss, sources, allow_unused=True)
                seen.parameters = dict(zip(self.trained, grads, strict=False))
        finally:
            for handle in handles:
                handle.remove()
            for module in widened:
                module.__dict__.pop("forward", None)
        return seen

    def _a_little_off(self, module: nn.Module, args: tuple, embeddings: Tensor) -> Tensor:
        """Embeddings in their own dtype, each element off by chance, in every run of this look alike."""
        generator = torch.Generator().manual_seed(self.look)
        noise = torch.randn(embeddings.shape, generator=generator).to(embeddings)
        return embeddings * (1 + _OFF * noise)

    def _probe(self, part: Candidate, seen: _Pass, eager: _Pass | None, is_wide: bool, head_is_wide: bool) -> list:
        """Hooks that look at what a part takes and gives."""

        def passed(x: Tensor, what: str, *, wide: bool) -> Tensor:
            place = (part.fqn, what)
            if eager is None:
                return _Probe.apply(x, place, seen, None, None)
            value, grad = (self._like(x, kept.get(place)) for kept in (eager.values, eager.grads))
            return _Probe.apply(x, place, seen, value.double() if wide else value, grad)

        def before(module, args, kwargs):
            x, with_x = _hidden_in(args, kwargs)
            if x is None:
                return None
            if module is self.first_layer and not x.requires_grad:
                x = x.detach().requires_grad_()
                seen.leaves.append(x)
            if part.part == _LAYERS and kwargs.get("past_key_values") is None:
                self.calls.setdefault(part.fqn, []).append((args, kwargs))
            return with_x(passed(x, _INPUT, wide=is_wide))

        def after(module, args, output):
            y = output[0] if isinstance(output, tuple) else output
            if not _is_hidden(y):
                return None
            y = passed(y, _OUTPUT, wide=is_wide and head_is_wide and part.part == _NORM)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return [
            part.module.register_forward_pre_hook(before, with_kwargs=True),
            part.module.register_forward_hook(after),
        ]

    def _like(self, x: Tensor, kept: Tensor | None) -> Tensor | None:
        """What the eager run saw, at the positions that `x` has: all, or the supervised ones."""
        if kept is None or kept.shape == x.shape:
            return kept
        return take_rows(kept, self.rows_of_tail)

    def _compared(self, eager: _Pass, truth: _Pass, fused: _Pass) -> Iterator[Row]:
        base_name, head_is_fused = type(self.base).__name__, is_swapped(self.base)
        for part in self.found:
            if part.part in (*_PROBED, HEAD) and not is_swapped(part.module):
                yield Row(part.fqn, part.part, part.reason or "runs unfused", 0.0, 0.0, is_fused=False)
        for part in self.parts:
            name = {_LAYERS: "layer", _NORM: "norm"}.get(part.part, part.part)
            for what in (_OUTPUT, _INPUT):
                place = (part.fqn, what)
                if place not in eager.values:
                    continue
                value = self._error(part, place, eager.values, truth.values, fused.values)
                grad = self._error(part, place, eager.grads, truth.grads, fused.grads)
                if what == _OUTPUT:
                    yield self._row(part, name, "output", *value)
                    if part.part == _NORM:
                        yield Row(base_name, HEAD, "gradient of the final norm's output", *grad, head_is_fused)
                else:  # forced on all parts before it, so what it takes is what the model around them gives it
                    exact = floor(torch.float64)
                    yield Row(base_name, HEAD, f"input of {part.fqn}", value[0], exact, head_is_fused)
                    yield self._row(part, name, "gradient of the input", *grad)
        losses = [run.loss.reshape(1) for run in (fused, eager, truth)]
        yield Row(base_name, HEAD, "loss", *self._difference(*losses, self._dtype()), head_is_fused)
        for name in self.trained:
            grads = [run.parameters.get(name) for run in (fused, eager, truth)]
            if all(grad is None for grad in grads):
                continue
            grads = [torch.zeros_like(self.trained[name]) if grad is None else grad for grad in grads]
            layer, part, inner = self._place_of(name)
            yield Row(layer, part, f"gradient of {inner}", *self._difference(*grads, self._dtype()))

    def _row(self, part: Candidate, name: str, what: str, difference: float, allowed: float) -> Row:
        """The row of a whole part; where a layer differs, of the half of it that does, unless weights are packed."""
        row = Row(part.fqn, name, what, difference, allowed)
        has_halves = part.part == _LAYERS and len(self.calls.get(part.fqn, ())) > 1
        if row.differs and has_halves and not packed_weights(part.module):
            row = row._replace(part=self._differing_half(part, allowed))
        return row

    def _differing_half(self, part: Candidate, allowed: float) -> str:
        """ "attention", or "mlp" where the layer agrees without the MLP's result: with zeros in its last linear."""
        down = self.paths.at(part.module, "down")
        path = f"inner.{self.paths.roles['down']}"
        zeros = {f"{path}.{name}": torch.zeros_like(parameter) for name, parameter in down.named_parameters()}

        def half(args, kwargs, like: Tensor | None) -> tuple[Tensor, Tensor]:
            args, kwargs = tree_map(
                lambda value: value.detach() if isinstance(value, Tensor) else value, (args, kwargs)
            )
            x, with_x = _hidden_in(args, kwargs)
            x = x.clone().requires_grad_()
            y = torch.func.functional_call(_ForwardOf(part.module), zeros, *with_x(x))
            y = y[0] if isinstance(y, tuple) else y
            y = y if like is None else self._like(like, y)
            y = torch.where(self._counts(y)[..., None], y, 0)
            return y, torch.autograd.grad(y.square().sum(), x)[0]

        fused = half(*self.calls[part.fqn][-1], None)
        with as_unfused(part.module):
            eager = half(*self.calls[part.fqn][0], fused[0])
        agrees = all(relative_error(x, y) <= allowed for x, y in zip(fused, eager, strict=True))
        return "mlp" if agrees else "attention"

    def _counts(self, like: Tensor) -> Tensor:
        """Which positions of a tensor are no padding."""
        return self.real if like.shape[1] == self.real.shape[1] else self.real.gather(1, self.rows_of_tail)

    def _dtype(self) -> torch.dtype:
        """The dtype that activations have."""
        return self.base.get_input_embeddings().weight.dtype

    def _error(self, part: Candidate, place, eager, truth, fused) -> tuple[float, float]:
        """Difference and what is allowed of it at a place, over the positions that are no padding."""
        if place not in eager and place not in fused:
            return 0.0, floor(torch.float64)
        like = fused.get(place, eager.get(place))
        tensors = []
        for kept in (fused, eager, truth):
            tensor = self._like(like, kept.get(place))
            tensor = torch.zeros_like(like) if tensor is None else tensor
            if part.part != _TOWER:
                tensor = torch.where(self._counts(like)[..., None], tensor, 0)
            tensors.append(tensor)
        return self._difference(*tensors, tensors[1].dtype)

    def _difference(self, fused: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> tuple[float, float]:
        if not eager.isfinite().all():  # nothing can be said of what the model's own computation does not give
            return 0.0, math.inf
        allowed = allowed_in_double() if self.is_double else _MARGIN * allowed_error(eager, truth, dtype)
        return relative_error(fused, truth), allowed

    def _place_of(self, parameter: str) -> tuple[str, str, str]:
        """Layer, part, and name below the layer of a trained parameter."""
        for part in self.parts:
            inner = parameter.removeprefix(f"{part.fqn}.")
            if inner == parameter:
                continue
            if part.part != _LAYERS:
                return part.fqn, "norm" if part.part == _NORM else part.part, inner
            role = next((role for role, path in self.paths.roles.items() if inner.startswith(f"{path}.")), None)
            if role is None:
                return part.fqn, "attention" if inner.startswith(f"{self.paths.attention}.") else "layer", inner
            return part.fqn, _PART_OF_ROLE.get(role, "norm"), inner
        layer, _, inner = parameter.rpartition(".")
        head = self.base.get_output_embeddings()
        is_head = head is not None and any(p is self.trained[parameter] for p in head.parameters())
        return layer, HEAD if is_head else "outside", inner


def _is_hidden(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _hidden_in(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, Callable[[Tensor], tuple[tuple, dict]]]:
    """What a part computes from: the first argument, or the first named tensor of floats; and how to pass another."""
    if args:
        return (args[0] if _is_hidden(args[0]) else None), lambda x: ((x, *args[1:]), kwargs)
    name = next((name for name, value in kwargs.items() if _is_hidden(value)), None)
    return kwargs.get(name), lambda x: (args, {**kwargs, name: x})


def _can_be_widened(module: nn.Module) -> bool:
    """Whether a module's computation is replaced by another and all its tensors are plain ones, which float64 can
    hold, or packed weights that can be read."""
    try:
        packed = {id(linear.weight) for linear in packed_weights(module)}
    except Unfusable:
        return False
    tensors = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in packed]
    return not isinstance(module, Graphless) and all(is_plain(t) and t.is_floating_point() for t in tensors)
