"""Times of whole ops through autograd, forward and every gradient, by provider at the sizes of 7B decoders."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gpu.op_cases import OpCase, timed_cases, with_leaves
from bench.gpu.timing import device_of, on_provider, timed
from bench.gpu.worker import one_line
from mmpeft_fast import saved_bytes
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.ops.providers import why_not_installed

_SECONDS_A_CASE = 2.0


def time_op(index: int, problem: list, providers: list[str], dtype: str, device: str) -> Iterator[dict]:
    """Rows of the `index`-th case of `timed_cases(*problem)`, providers in turn."""
    case = list(timed_cases(*problem))[index]
    operands = case.operands(DTYPES[dtype], device, torch.float32 if dtype == "bf16" else None)
    common = {"op": case.ops[0], "case": case.name, "dtype": dtype, "mode": "eager"}
    steps, saved = {}, {}
    for name in providers:
        if why_not_installed(name) is not None:  # asking loads the extension
            continue
        step = _step(case, operands, name)
        try:
            with on_provider(name), saved_bytes() as kept:
                step(forward_only=True)
            step()
        except RuntimeError as error:
            yield {**common, "implementation": name, "error": one_line(error)}
        else:
            steps[name], saved[name] = step, kept.bytes / 2**20
    for name, times in timed(steps, device_of(device), seconds=_SECONDS_A_CASE).items():
        yield {**common, "implementation": name, **times.row(), "saved_mib": saved[name]}


def _step(case: OpCase, operands: dict, provider: str):
    arguments, leaves = with_leaves(operands)
    upstream: list[Tensor] = []

    def step(forward_only: bool = False):
        with on_provider(provider):
            outputs = case.op(**arguments)
            upstream.extend(torch.randn_like(y) for y in outputs[len(upstream) :])
            return None if forward_only else torch.autograd.grad(outputs, leaves, upstream)

    return step
