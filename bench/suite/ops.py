"""Single ops of the registry as cases; `peft` is an op's definition in plain torch, as stock stacks have it."""

import contextlib
from dataclasses import replace

import torch
from torch import Tensor

from bench.gpu.judge import Outputs
from bench.gpu.timing import on_provider
from bench.registry import Shape, make_case
from bench.suite.cases import Case
from bench.suite.implementations import Implementation
from mmpeft_fast import profile, saved_bytes
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.measure import peak_bytes
from mmpeft_fast.profiling.rows import total


def _shape(case: Case) -> Shape:
    """Attention has as many heads of keys as of queries in it."""
    sizes = {"num_virtual_tokens": case.rank} if case.method == "prefix" else {"rank": max(case.rank, 1)}
    return Shape(
        tokens=case.tokens, length=case.seq_len, hidden=case.hidden, intermediate=case.intermediate, heads=case.heads,
        dropout=case.dropout, vocab=case.vocab, **sizes,
    )  # fmt: skip


class OpTrial:
    """What a `Trial` does, of an op."""

    def __init__(self, case: Case, implementation: Implementation, dtype: torch.dtype, device: str):
        self.case, self.implementation, self.device = case, implementation, device
        self._key = "fused" if implementation.is_fused else "eager" if implementation.trains else "frozen"
        self._make = lambda shape: make_case(case.what, shape, dtype=dtype, device=device)
        self._op = self._make(_shape(case))

    def _context(self) -> contextlib.AbstractContextManager:
        return on_provider(self.implementation.provider or "")

    def run(self) -> None:
        with self._context():
            self._op.run(self._key)

    def outcome(self) -> dict[str, Tensor | None]:
        """Outputs and gradients by number; without dropout."""
        op = self._make(replace(_shape(self.case), dropout=0.0))
        with self._context():
            outputs, wanted = op.forwards[self._key](), op.wanted[self._key]
            grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])
        named = {"output": outputs, "gradient": grads}
        return {f"{kind} {i}": one.detach() for kind, tensors in named.items() for i, one in enumerate(tensors)}

    def memory(self) -> dict[str, float]:
        """As `Trial.memory`, what goes in counted where it is kept."""
        with self._context(), saved_bytes() as saved:
            self._op.forwards[self._key]()
        before = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        with peak_bytes(self.device) as peak:
            self.run()
        return {"saved_mib": saved.bytes / 2**20, "peak_mib": (peak.bytes - before) / 2**20}

    def work(self) -> dict[str, int]:
        with profile() as profiled:
            self.run()
        whole = total(profiled.rows)
        return {"flops": whole.flops, "bytes": whole.bytes, "launches": whole.launches}


class Ops:
    """Trials of an op, all on the same values."""

    def __init__(self, case: Case, device: str):
        self._case, self._device = case, device

    def trial(self, implementation: Implementation, stack: contextlib.ExitStack) -> OpTrial:
        return OpTrial(self._case, implementation, DTYPES[self._case.dtype], self._device)

    def truth(self) -> Outputs:
        return OpTrial(self._case, Implementation(), torch.float64, self._device).outcome()

    def eager(self, *, narrow: bool) -> Outputs:
        return OpTrial(self._case, Implementation(), DTYPES[self._case.dtype], self._device).outcome()
