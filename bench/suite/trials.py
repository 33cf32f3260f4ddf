"""One implementation of a case, ready to run: its loss and gradients, the bytes it keeps, its work."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.gpu.judge import Outputs, verdict
from bench.gpu.timing import on_provider
from bench.suite.cases import LAYER, Case, batch, stock
from bench.suite.implementations import Implementation
from mmpeft_fast import profile, saved_bytes
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.models import base_model, family_of
from mmpeft_fast.profiling.rows import total
from mmpeft_fast.stored.baseline import add_baseline

_INPUT = "input"


def baseline(case: Case, device: str) -> nn.Module:
    """HF PEFT's model, or eager modules for a method that it does not have; what is trained is off its initial zeros
    and has values that the model's dtype can hold, so that all implementations start from the same."""
    model, _ = add_baseline(stock(case, device), case.made_method())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator).mul_(0.02).to(parameter)
                parameter.copy_(parameter.to(DTYPES[case.dtype]))
    return model.train()


class Trial:
    """A model on a batch; `run` is a forward and a backward pass.

    The gradient of the input is wanted where nothing is trained, and of a layer, which has others below it.
    """

    def __init__(self, case: Case, implementation: Implementation, model: nn.Module, device: str):
        self.case, self.implementation = case, implementation
        if implementation.narrow:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(DTYPES[case.dtype])
        self.model = implementation.prepare(model).train()
        dtype = next(parameter.dtype for parameter in model.parameters() if not parameter.requires_grad)
        self.batch = {name: _widened(tensor, dtype) for name, tensor in batch(case, device).items()}
        called = self.model
        if case.what == LAYER:
            base = base_model(self.model)
            called = family_of(base).decoder_of(base)
            del self.batch["labels"]
            generator = torch.Generator().manual_seed(1)
            shape = self.batch["inputs_embeds"].shape
            self.upstream = torch.randn(shape, generator=generator).to(device, DTYPES[case.dtype]).to(dtype)
        elif implementation.is_fused:
            # Known on the host, as the package's collator knows it: the step need not wait for a GPU.
            count = (self.batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).max()
            self.batch["supervised_capacity"] = int(count)
        self.called = implementation.wrap(called)

    def _on_provider(self) -> contextlib.AbstractContextManager:
        return on_provider(self.implementation.provider or "")

    def forward(self) -> tuple[Tensor, Tensor]:
        """(loss, or the last hidden states; the input)."""
        for parameter in self.model.parameters():
            parameter.grad = None
        wants_dx = self.case.what == LAYER or not self.implementation.trains
        embeddings = self.batch["inputs_embeds"].detach().requires_grad_(wants_dx)
        with self._on_provider():
            made = self.called(**{**self.batch, "inputs_embeds": embeddings}, use_cache=False)
        return (made.last_hidden_state if self.case.what == LAYER else made.loss), embeddings

    def run(self) -> tuple[Tensor, Tensor]:
        made, embeddings = self.forward()
        with self._on_provider():
            made.backward(self.upstream if self.case.what == LAYER else None)
        return made, embeddings

    def outcome(self) -> dict[str, Tensor | None]:
        """The loss (a layer's output), and gradients by the name of what they are of; without dropout."""
        with self._without_dropout():
            made, embeddings = self.run()
        found = {"output" if self.case.what == LAYER else "loss": made.detach(), _INPUT: embeddings.grad}
        return found | {
            name: parameter.grad for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }

    @contextlib.contextmanager
    def _without_dropout(self) -> Iterator[None]:
        base = base_model(self.model)
        layers = family_of(base).layers_of(base) if self.case.dropout else []
        for layer in layers:
            layer.eval()
        try:
            yield
        finally:
            for layer in layers:
                layer.train()

    def kept_bytes(self) -> int:
        with saved_bytes(self.model) as saved:
            self.forward()
        return saved.bytes

    def work(self) -> dict[str, int]:
        """FLOPs, bytes moved and launches of a pass, as the profiler counts them."""
        with profile(self.model) as profiled:
            self.run()
        whole = total(profiled.rows)
        return {"flops": whole.flops, "bytes": whole.bytes, "launches": whole.launches}


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def truth_of(case: Case, implementation: Implementation, model: nn.Module, device: str) -> Outputs:
    """The outcome of HF PEFT's model in float64, from the same values."""
    return Trial(case, implementation, copy.deepcopy(model).double(), device).outcome()


class Judge:
    """Holds outcomes to the truth, each as far off as HF PEFT with adapters of the same dtype may be."""

    def __init__(self, case: Case, peft: Implementation, model: nn.Module, device: str):
        self.truth, self._dtype = truth_of(case, peft, model, device), DTYPES[case.dtype]
        self._eager: dict[bool, Outputs] = {}
        self._made: Callable[[bool], Outputs] = lambda narrow: Trial(
            case, replace(peft, narrow=narrow), copy.deepcopy(model), device
        ).outcome()

    def verdict(self, trial: Trial) -> dict[str, object]:
        """As `judge.verdict` has it."""
        narrow = trial.implementation.narrow
        if narrow not in self._eager:
            self._eager[narrow] = self._made(narrow)
        return verdict(trial.outcome(), self._eager[narrow], self.truth, self._dtype)
