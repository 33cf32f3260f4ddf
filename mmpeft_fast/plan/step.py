"""One training step of real model code on placeholders, and everything that is counted in it."""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.layers.reading import is_fused
from mmpeft_fast.measure import peak_bytes, saved_bytes
from mmpeft_fast.models import base_model, empty_model, family_of
from mmpeft_fast.ops import fused_linear
from mmpeft_fast.ops.providers import provider
from mmpeft_fast.peft_model import add_peft, fuse, study_method
from mmpeft_fast.plan.counting import Recorder, Work
from mmpeft_fast.plan.parts import Regions
from mmpeft_fast.plan.placeholders import Placeholders
from mmpeft_fast.plan.request import DENSE, Request
from mmpeft_fast.plan.triton_calls import counted_triton, dispatched_as
from mmpeft_fast.stored.baseline import add_baseline


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """What one step takes.

    Attributes:
        baseline: whose code runs, such as "HF PEFT 0.21.2".
        weight_bytes, gradient_bytes, optimizer_bytes: of all parameters and buffers; of the trained parameters; of
            AdamW's states.
        saved_bytes: what autograd keeps from the forward pass. peak_bytes: of all tensors, states included.
        sequence: every piece of work in the order in which it is queued.
    """

    baseline: str
    trainable_params: int
    frozen_params: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    peak_bytes: int
    sequence: tuple[Work, ...]

    @functools.cached_property
    def works(self) -> Counter[Work]:
        """Every distinct piece of work and how often it runs."""
        return Counter(self.sequence)


def count_step(request: Request, device_type: str, *, gpu_name: str = "", sdpa: str = "flash") -> StepCounts:
    """Counts a step on a device of a type ("cuda" or "cpu").

    Args:
        gpu_name: what the GPU's driver calls it: the fused ops run as its committed table says, as on a GPU without a
            table where there is none.
        sdpa: the library's attention there, "flash" or "cudnn".

    Raises:
        ValueError: the request does not fit its model, or its implementation has no such combination.
    """
    with contextlib.ExitStack() as stack:
        if device_type == "cuda":
            stack.enter_context(dispatched_as(gpu_name))
        return _count(request, device_type, sdpa)


def _count(request: Request, device_type: str, sdpa: str) -> StepCounts:
    if request.base == "int8" and device_type != "cpu":
        raise ValueError("base: expected dense, nf4 or fp4 on a GPU, where int8 layers do not train fused; got 'int8'")
    config = request.config()
    model, baseline = build(request, config)
    place = Placeholders(device_type, sdpa)
    formats = _format_tensors(model, request, place)
    place.materialize(model)
    inputs = request.batch(config, place.empty)
    if request.implementation == "frozen":
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    base = base_model(model)
    regions = Regions(base, family_of(base))
    recorder = Recorder(regions)
    if request.checkpointing:
        _checkpoint(base, place, recorder)
        inputs["use_cache"] = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    runs_triton = device_type == "cuda" and request.implementation == "fused"
    with contextlib.ExitStack() as stack:
        stack.enter_context(counted_triton(recorder) if runs_triton else provider("torch"))
        stack.enter_context(place)
        stack.enter_context(_remade_as(recorder))
        optimizer = _optimizer_with_states(trained, request.optimizer)
        states = _states(optimizer)
        holder = nn.Module()
        holder.model = model
        for i, state in enumerate((*states, *formats)):
            holder.register_buffer(f"state_{i}", state)
        stack.enter_context(regions)
        if request.implementation == "fused":
            _read_layers(base)
        peak = stack.enter_context(peak_bytes("cpu", holder))
        with recorder:
            with saved_bytes(model) as saved:
                loss = _loss(model, inputs, baseline, request)
            regions.start("head")
            loss.backward()
            if optimizer is not None:
                with recorder.during("optimizer"):
                    optimizer.step()
    parameters = list(model.parameters())
    return StepCounts(
        baseline=baseline,
        trainable_params=sum(parameter.numel() for parameter in trained),
        frozen_params=sum(parameter.numel() for parameter in parameters if not parameter.requires_grad),
        weight_bytes=_nbytes([*parameters, *model.buffers(), *formats]),
        gradient_bytes=_nbytes([parameter.grad for parameter in trained if parameter.grad is not None]),
        optimizer_bytes=_nbytes(states),
        saved_bytes=saved.bytes,
        peak_bytes=peak.bytes,
        sequence=tuple(recorder.sequence),
    )


def _read_layers(base: nn.Module) -> None:
    """As before every step but a first one: what the fused layers are made of is known."""
    family = family_of(base)
    for layer in family.layers_of(base):
        is_fused(layer, family.paths)


def _loss(model: nn.Module, inputs: dict, baseline: str, request: Request) -> Tensor:
    """Raises ValueError where code that is not this package's cannot run the step."""
    try:
        return model(**inputs).loss
    except RuntimeError as error:
        if request.implementation == "fused":
            raise
        raise ValueError(f"implementation: {baseline} cannot run this step: {' '.join(str(error).split())}") from error


def _format_tensors(model: nn.Module, request: Request, place: Placeholders) -> list[Tensor]:
    """What packed weights consist of besides parameters (scales, tables), as placeholders of the device."""
    if request.base == DENSE:
        return []
    from mmpeft_fast.quantised import move_packed

    return move_packed(model, place.placed)


def build(request: Request, config) -> tuple[nn.Module, str]:
    """The model to train, on meta, and whose code it is."""
    try:
        model = empty_model(config, dtype=DTYPES[request.dtype])
    except (TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model: transformers cannot build the model of {request.model!r}: {reason}") from error
    if request.base != DENSE:
        from mmpeft_fast.quantised import quantise

        quantise(model, request.base)
    if request.implementation == "frozen":
        return model.requires_grad_(False).train(), "transformers"
    own = {id(parameter) for parameter in model.parameters()}
    method, is_peft = study_method(model, request.method, **request.settings), request.implementation == "peft"
    add = add_baseline if is_peft else add_peft
    added = add(model, method, train_connector="connector" in request.train)
    model, baseline = added if is_peft else (added, "mmpeft-fast")
    for part, find in (("embeddings", "get_input_embeddings"), ("head", "get_output_embeddings")):
        if part in request.train:
            getattr(base_model(model), find)().requires_grad_(True)
    if request.checkpointing and request.method == "prefix" and baseline.startswith("HF PEFT"):
        raise ValueError(
            "checkpointing: expected implementation fused with method prefix; HF PEFT keeps the prefix in the "
            "key/value cache, which checkpointing turns off"
        )
    if not request.fp32_adapters:
        for parameter in model.parameters():
            if id(parameter) not in own and parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[request.dtype])
    return (model if is_peft else fuse(model, recompute=request.recompute)).train(), baseline


def _checkpoint(model: nn.Module, place: Placeholders, recorder: Recorder) -> None:
    """Turns activation checkpointing on; what it computes again is counted as such."""

    @contextlib.contextmanager
    def again():
        # Function modes are off while the function `backward` runs.
        with place.functions(), recorder.during("recompute"):
            yield

    model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), again())}
    )


@contextlib.contextmanager
def _remade_as(recorder: Recorder) -> Iterator[None]:
    """What fused layers make again in the backward is counted as such."""
    before, fused_linear.recomputing = fused_linear.recomputing, lambda: recorder.during("recompute")
    try:
        yield
    finally:
        fused_linear.recomputing = before


class _FusedAdamW(torch.optim.AdamW):
    """AdamW in one pass over placeholders, for which torch's class refuses it."""

    def step(self) -> None:
        options = self.param_groups[0]
        trained = [parameter for parameter in options["params"] if parameter.grad is not None]
        for parameter in trained:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        states = [self.state[parameter] for parameter in trained]
        first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        torch._fused_adamw_(
            trained, [parameter.grad for parameter in trained], first, second, [], steps, lr=options["lr"], beta1=0.9,
            beta2=0.999, weight_decay=0.0, eps=options["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip


def _optimizer_with_states(trained: list[nn.Parameter], kind: str) -> torch.optim.AdamW | None:
    """AdamW after a first step, so that its states exist; None where nothing is trained."""
    if not trained:
        return None
    if kind == "fused":
        optimizer: torch.optim.AdamW = _FusedAdamW(trained)
    else:
        optimizer = torch.optim.AdamW(trained, foreach=trained[0].is_meta)  # as torch chooses on a GPU
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _states(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    if optimizer is None:
        return []
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _nbytes(tensors: list[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
