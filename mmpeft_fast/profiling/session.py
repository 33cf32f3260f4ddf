"""`with mmpeft_fast.profile(model) as p:` around any code: its ops under torch's profiler, its memory by role."""

import json
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity

from mmpeft_fast.models import base_model, family_of
from mmpeft_fast.plan.devices import Device
from mmpeft_fast.plan.parts import Regions
from mmpeft_fast.profiling.folder import check_folder, write_profile
from mmpeft_fast.profiling.measured import Measured
from mmpeft_fast.profiling.rows import Row, rows_of, table_text
from mmpeft_fast.profiling.storages import SAVED, Timeline
from mmpeft_fast.profiling.trace import spans
from mmpeft_fast.profiling.tracer import OneRegion, Tracer, traced_kernel_sets

TRACED = "the traced code"  # what a profile around user code is called


class profile:
    """Profiles what runs inside, forward, backward and optimizer steps, on CPU and GPU.

        with mmpeft_fast.profile(model) as p:
            model(**batch).loss.backward()
        print(p.table())
        p.save("profile")

    Times of ops are those of their own code or, where any tensor is on a GPU, of their kernels, without what the
    tracing costs; the time between ops is longer than in a run without it.

    Args:
        model: whose parts work and memory are listed by; of a known family (inside HF PEFT or not) for all parts, else
            the ops alone tell them apart. None: any code.
        output: folder to save to at the end, unless the code raises.
        device: its profile (`plan.devices.device_named`, `plan.calibrate.calibrate`), for the share of the roofline.
        region: what the code does before the model or without it, a part or "decoder".

    Attributes, once it has ended:
        rows: a `Row` for each op of a part and phase, the slowest first.
        timeline: bytes alive by role.
        seconds: from beginning to end, tracing included.

    Raises:
        ValueError: `output` is a file, or a folder with other things in it.
        RuntimeError: used while it runs; torch's profiler records nothing.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        output: str | Path | None = None,
        *,
        device: Device | None = None,
        region: str = "inputs",
    ):
        self.rows: list[Row] = []
        self.timeline = Timeline([], [])
        self.seconds = 0.0
        self.trace = ""
        # What was measured may be kept when the model is not.
        self._model = None if model is None else weakref.ref(model)
        self._name = "–" if model is None else type(base_model(model)).__name__
        self._device, self._region = device, region
        self._output = None if output is None else Path(output)
        if self._output is not None:
            check_folder(self._output)
        self._stack: ExitStack | None = None

    def __enter__(self) -> "profile":
        if self._stack is not None:
            raise RuntimeError("profile: expected a profile that has ended, this one still runs")
        with ExitStack() as stack:
            places = OneRegion()
            model = None if self._model is None else self._model()
            if _has_regions(model):
                base = base_model(model)
                places = stack.enter_context(Regions(base, family_of(base)))
                places.start(self._region)
            self._tracer = Tracer(places)
            stack.callback(self._tracer.storages.close)
            if self._model is not None:
                self._see_model(before=True)
            if torch.cuda.is_available():
                stack.enter_context(traced_kernel_sets(self._tracer))
            stack.enter_context(_optimizers(self._tracer))
            self._profiler = torch.profiler.profile(activities=activities())
            stack.enter_context(self._profiler)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
            stack.enter_context(self._tracer)
            synchronize()
            self._started = time.perf_counter()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, value, traceback) -> None:
        stack, self._stack = self._stack, None
        with stack:
            if kind is None:
                synchronize()
                self.seconds = time.perf_counter() - self._started
                if self._model is not None:
                    self._see_model()
                self.timeline = self._tracer.storages.timeline()
        if kind is None:
            self.trace = chrome_trace(self._profiler)
            inside, outside = spans(json.loads(self.trace)["traceEvents"], on_gpu=self._tracer.on_gpu)
            if self._tracer.works and not inside:
                raise RuntimeError(
                    f"profile: expected {'kernels' if self._tracer.on_gpu else 'ops'} in the trace of "
                    f"{len(self._tracer.works)} ops, torch's profiler recorded none; another one may be running, or "
                    "CUPTI be missing"
                )
            self.rows = rows_of(self._tracer.works, inside, outside, self._device)
            if self._output is not None:
                self.save(self._output)
        del self._tracer, self._profiler

    def _pack(self, tensor: Tensor) -> Tensor:
        # Autograd saves an op's inputs before the op runs; what no op has given was there before.
        self._tracer.storages.see([tensor], before=True)
        self._tracer.storages.see([tensor], SAVED)
        # An op's own output would refer to the op that keeps it: a cycle, alive until the backward pass.
        return tensor if tensor.is_leaf else tensor.detach()

    def _see_model(self, *, before: bool = False) -> None:
        model, storages = self._model(), self._tracer.storages
        parameters = list(model.parameters())
        storages.see([*parameters, *model.buffers()], "parameters", before=before)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        storages.see(gradients, "gradients", before=before)

    def table(self, *, num_ops: int = 20) -> str:
        """Time, launches, FLOPs and bytes by part and of the slowest ops, and what held the peak of memory."""
        held = (f"  {role:20}{size / 2**20:12.2f} MiB" for role, size in self.timeline.peak_by_role().items())
        peak = f"peak of memory        {self.timeline.peak_bytes / 2**20:12.2f} MiB"
        return "\n".join([table_text(self.rows, num_ops=num_ops), "", peak, *held])

    def save(self, folder: str | Path) -> Path:
        """Writes trace_code.json, profile.json and report.html into `folder`, whole or not at all; returns it."""
        measured = Measured(
            name="code", origin=TRACED, times_s=[self.seconds], rows=self.rows, timeline=self.timeline,
            trace=self.trace,
        )  # fmt: skip
        request = {"what": TRACED, "model": self._name}
        return write_profile(Path(folder), [measured], request, self._device)


def _has_regions(model: nn.Module | None) -> bool:
    """Whether the model is a whole one of a known family."""
    if model is None:
        return False
    try:
        family_of(base_model(model))
    except ValueError:
        return False
    return True


@contextmanager
def _optimizers(tracer: Tracer) -> Iterator[None]:
    """What optimizers do inside is of the phase "optimizer", and their states are known as such."""

    def before(optimizer, args, kwargs) -> None:
        tracer.in_optimizer = True
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        tracer.storages.see(parameters, "parameters", before=True)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        tracer.storages.see(gradients, "gradients", before=True)
        tracer.storages.see(_states(optimizer), "optimizer states", before=True)

    def after(optimizer, args, kwargs) -> None:
        tracer.in_optimizer = False
        tracer.storages.see(_states(optimizer), "optimizer states")

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def activities() -> list[ProfilerActivity]:
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *gpu]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def chrome_trace(profiler: torch.profiler.profile) -> str:
    """The trace as JSON text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return path.read_text(encoding="utf-8")
