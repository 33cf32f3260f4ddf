"""One implementation of a case, ready to run: its loss and gradients, the bytes it keeps, its work."""

import contextlib
import copy
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.gpu.judge import Outputs, verdict
from bench.gpu.timing import on_provider
from bench.suite.cases import LAYER, STEP, Case, batch, stock
from bench.suite.implementations import Implementation
from bench.suite.ops import Ops, OpTrial
from bench.suite.peers import PeerTrial
from mmpeft_fast import profile, saved_bytes
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.measure import peak_bytes
from mmpeft_fast.models import base_model, family_of
from mmpeft_fast.profiling.rows import total
from mmpeft_fast.stored.baseline import add_baseline


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
        self.case, self.implementation, self.device = case, implementation, device
        if implementation.narrow:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(DTYPES[case.dtype])
        self.model = implementation.prepare(model).train()
        self.batch = batch(case, device)
        self.upstream: Tensor | None = None  # of a layer's output
        called = self.model
        if case.what == LAYER:
            base = base_model(self.model)
            called = family_of(base).decoder_of(base)
            dtype = next(parameter.dtype for parameter in model.parameters() if not parameter.requires_grad)
            inputs = self.batch["inputs_embeds"]
            generator = torch.Generator().manual_seed(1)
            self.upstream = torch.randn(inputs.shape, generator=generator).to(inputs).to(dtype)
            self.batch["inputs_embeds"] = inputs.to(dtype)
        elif implementation.is_fused:
            # Known on the host, as the package's collator knows it: the step need not wait for a GPU.
            count = (self.batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).max()
            self.batch["supervised_capacity"] = int(count)
        if case.what == STEP and not implementation.trains:
            self.model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        self.called = implementation.wrap(called)

    def _context(self) -> contextlib.AbstractContextManager:
        return on_provider(self.implementation.provider or "")

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """(loss, None), or of a layer (the last hidden states, the input)."""
        for parameter in self.model.parameters():
            parameter.grad = None
        with self._context():
            if self.case.what == STEP:
                return self.called(**self.batch, use_cache=False).loss, None
            inputs = self.batch["inputs_embeds"].detach().requires_grad_()
            return self.called(inputs_embeds=inputs, use_cache=False).last_hidden_state, inputs

    def run(self) -> tuple[Tensor, Tensor | None]:
        made, inputs = self.forward()
        with self._context():
            made.backward(self.upstream)
        return made, inputs

    def outcome(self) -> dict[str, Tensor | None]:
        """The loss (a layer's output), and gradients by the name of what they are of; without dropout."""
        with self._without_dropout():
            made, inputs = self.run()
        found = {"loss": made.detach()} if inputs is None else {"output": made.detach(), "input": inputs.grad}
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

    def memory(self) -> dict[str, float]:
        """MiB kept for the backward pass, and the peak of a pass above the weights.

        The peak on a CPU is made of single ops, into which compiled code is not divided.
        """
        with saved_bytes(self.model) as saved:
            self.forward()
        found = {"saved_mib": saved.bytes / 2**20}
        if self.implementation.is_opaque and self.device != "cuda":
            return found
        before = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        with peak_bytes(self.device) as peak:
            self.run()
        return found | {"peak_mib": (peak.bytes - before) / 2**20}

    def work(self) -> dict[str, int]:
        """FLOPs, bytes moved and launches of a pass, as the profiler counts them."""
        with profile(self.model) as profiled:
            self.run()
        whole = total(profiled.rows)
        return {"flops": whole.flops, "bytes": whole.bytes, "launches": whole.launches}


class Decoders:
    """Trials of a step or a layer, all from the same weights."""

    def __init__(self, case: Case, device: str):
        self._case, self._device = case, device
        self._model = baseline(case, device)

    def trial(self, implementation: Implementation, stack: contextlib.ExitStack) -> Trial | PeerTrial:
        """stack: ends the process of a peer."""
        if implementation.peer is not None:
            return stack.enter_context(PeerTrial(self._case, implementation, self._model, self._device))
        if not implementation.trains:
            model = stock(self._case, self._device).requires_grad_(False)
        else:
            model = copy.deepcopy(self._model)
        return Trial(self._case, implementation, model, self._device)

    def truth(self) -> Outputs:
        """Of HF PEFT in float64, from the same values."""
        return Trial(self._case, Implementation(), copy.deepcopy(self._model).double(), self._device).outcome()

    def eager(self, *, narrow: bool) -> Outputs:
        """Of HF PEFT, its adapters in the model's dtype or as it makes them."""
        return Trial(self._case, Implementation(narrow=narrow), copy.deepcopy(self._model), self._device).outcome()


class Judge:
    """Holds outcomes to the truth, each as far off as HF PEFT with adapters of the same dtype may be."""

    def __init__(self, case: Case, subject: Decoders | Ops):
        self._subject, self._dtype = subject, DTYPES[case.dtype]
        self._truth = subject.truth()
        self._eager = functools.cache(lambda narrow: subject.eager(narrow=narrow))

    def verdict(self, trial: Trial | PeerTrial | OpTrial) -> dict[str, object]:
        """As `judge.verdict` has it."""
        return verdict(trial.outcome(), self._eager(trial.implementation.narrow), self._truth, self._dtype)
