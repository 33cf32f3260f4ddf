"""Cells in a process of their own: `python -m mmpeft_fast.study.cell --spec JSON --out FILE`.

Trains one method on one model, and times each training step beside a step of the frozen model in the same process, so
that the ratio of the two holds on a machine whose speed changes from minute to minute. Cells that are not timed come
several to a process, which loads their base and their samples once.
"""

import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpeft_fast import __version__
from mmpeft_fast.atomic import write_text
from mmpeft_fast.data import Collator, Sample
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.measure import peak_bytes, saved_bytes
from mmpeft_fast.models import load_pretrained
from mmpeft_fast.peft_model import add_peft, fuse, study_method
from mmpeft_fast.plugins import load_plugins
from mmpeft_fast.small_batches import cut_batch
from mmpeft_fast.stored.baseline import add_baseline
from mmpeft_fast.study.cells import CellSpec
from mmpeft_fast.study.inputs import Inputs, load_samples, sample_batches
from mmpeft_fast.study.process import child_main, outcome_of
from mmpeft_fast.study.steps import frozen_forward, frozen_step, frozen_twin, inputs_for, training_steps
from mmpeft_fast.train import evaluate_accuracy, seed_everything

WARMUP_STEPS = 4  # steps whose time does not count: first-touch of memory, optimizer state, library set-up
EVAL_BATCH_SIZE = 25  # of 200 samples: whole batches
MIB = 2**20


class Subject:
    """A base with its samples, loaded once for all cells that start from it."""

    def __init__(self, base: str, dtype: str, inputs: Inputs) -> None:
        self._inputs = inputs
        self._model, processor = load_pretrained(base, dtype=DTYPES[dtype])
        self._model.requires_grad_(False)
        self.collator = Collator(processor)
        self.samples = cache(self._load)

    def _load(self, task: str, eval_samples: int) -> tuple[list[Sample], list[Sample]]:
        return load_samples(self._inputs, task, eval_samples=eval_samples)

    def model(self) -> nn.Module:
        """A model of its own for each cell."""
        return copy.deepcopy(self._model)


def measure(spec: CellSpec, inputs: Inputs, base: str) -> dict:
    """Runs a cell that has its process for itself.

    Args:
        spec: the cell.
        inputs: where its conversations are.
        base: folder or name of the checkpoint it starts from.

    Returns:
        the measured fields of its row; the notes of the report define them.
    """
    return measure_on(Subject(base, spec.dtype, inputs), spec)


def measure_on(subject: Subject, spec: CellSpec) -> dict:
    """Runs a cell on its base, see `measure`."""
    torch.set_num_threads(spec.threads)
    train, evaluation = subject.samples(spec.task, spec.eval_samples)
    batches = [
        subject.collator(samples)
        for samples in sample_batches(
            train[: spec.train_samples], batch_size=spec.batch_size, steps=spec.steps, seed=spec.seed
        )
    ]
    batches[-1] = batches[0]  # so that the first and the last loss are of the same samples
    model = subject.model().to(spec.device)
    twin = frozen_twin(model) if spec.timed else None
    model, implementation = _prepare(model, spec, batches[0])
    measured = _sizes(model, batches) | {"baseline": implementation, "trainable_params": _num_trainable(model, spec)}
    if spec.timed:
        losses, step_ms, frozen_step_ms = _run_steps(model, twin, batches, spec)
        measured |= {
            "losses": losses,
            "step_ms_p50": statistics.median(step_ms),
            "frozen_step_ms_p50": statistics.median(frozen_step_ms),
        }
        del twin
    elif spec.implementation != "frozen":
        model.train()
        step = _stepper(model, spec)
        measured["losses"] = [step(inputs_for(model, batch)).item() for batch in batches]
    if spec.implementation != "peft":  # which computes what the fused one does
        accuracy = evaluate_accuracy(model, subject.collator, evaluation, batch_size=EVAL_BATCH_SIZE)
        measured["accuracy"] = accuracy
    if spec.timed:
        measured |= _memory(model, batches[0], spec)
    return measured


def _prepare(model: nn.Module, spec: CellSpec, batch: dict) -> tuple[nn.Module, str]:
    """The model with its method, and whose code runs it."""
    if spec.implementation == "frozen":
        return model, "transformers"
    method = study_method(model, spec.method, **spec.overrides)
    seed_everything(spec.seed)
    if spec.implementation == "peft":
        return add_baseline(model, method, train_connector=spec.train_connector)
    # HF PEFT draws initial values in an order of its own, so the fused model starts from those it would have drawn.
    reference, _ = add_baseline(frozen_twin(model), method, train_connector=spec.train_connector)
    add_peft(model, method, train_connector=spec.train_connector)
    with torch.no_grad():
        for parameter, initial in zip(_trainable(model), _trainable(reference), strict=True):
            parameter.copy_(initial.view_as(parameter))
    seed_everything(spec.seed)
    return fuse(model, verify=cut_batch(batch)), f"mmpeft-fast {__version__}"


def _num_trainable(model: nn.Module, spec: CellSpec) -> int:
    return 0 if spec.implementation == "frozen" else sum(p.numel() for p in _trainable(model))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _run_steps(
    model: nn.Module, twin: nn.Module, batches: list[dict], spec: CellSpec
) -> tuple[list[float], list[float], list[float]]:
    """Losses of all steps; milliseconds of the timed ones, and of the twin's frozen step on the same batches."""
    model.train()
    twin.train()
    step = _stepper(model, spec)
    losses, step_ms, frozen_step_ms = [], [], []
    for index, batch in enumerate(batches):
        loss, elapsed_ms = _timed(step, inputs_for(model, batch))
        losses.append(loss)
        is_timed = index >= min(WARMUP_STEPS, len(batches) - 1)
        if is_timed:
            step_ms.append(elapsed_ms)
        if spec.implementation != "frozen":
            elapsed_ms = _timed(partial(frozen_step, twin), inputs_for(twin, batch))[1]
        if is_timed:
            frozen_step_ms.append(elapsed_ms)
    return losses, step_ms, frozen_step_ms


def _stepper(model: nn.Module, spec: CellSpec) -> Callable[[dict], Tensor]:
    """The step that this cell is about, as a function of its inputs."""
    if spec.implementation == "frozen":
        return partial(frozen_step, model)
    return training_steps(model, learning_rate=spec.learning_rate, num_steps=spec.steps)


def _timed(step: Callable[[dict], Tensor], inputs: dict) -> tuple[float, float]:
    """The step's loss and its milliseconds, the device's queue drained before and after."""
    _synchronize(inputs)
    started = time.perf_counter()
    loss = step(inputs)
    _synchronize(inputs)
    elapsed_ms = (time.perf_counter() - started) * 1e3
    return loss.item(), elapsed_ms


def _synchronize(inputs: dict) -> None:
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()


def _sizes(model: nn.Module, batches: list[dict]) -> dict:
    def mean(count: Callable[[dict], Tensor]) -> float:
        return statistics.fmean(int(count(batch)) for batch in batches)

    return {
        "total_params": sum(p.numel() for p in model.parameters()),
        "tokens_per_step": mean(lambda batch: batch["attention_mask"].sum()),
        "padded_tokens_per_step": mean(lambda batch: batch["attention_mask"].numel()),
        "supervised_tokens_per_step": mean(lambda batch: (batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
    }


def _memory(model: nn.Module, batch: dict, spec: CellSpec) -> dict:
    """MiB kept for backward, and the peak of a whole step, in steps of their own: measuring slows them down."""
    model.train()
    inputs = inputs_for(model, batch)
    with saved_bytes(model) as saved:
        loss: Tensor = frozen_forward(model, inputs) if spec.implementation == "frozen" else model(**inputs).loss
    del loss
    step = _stepper(model, spec)
    step(inputs)  # the optimizer's state exists from here on
    with peak_bytes(inputs["input_ids"].device, model) as peak:
        step(inputs)
    return {"saved_mib": saved.bytes / MIB, "peak_mib": peak.bytes / MIB}


def _run(job: dict) -> dict:
    load_plugins()
    inputs = Inputs(**job["inputs"])
    if "spec" in job:
        return measure(CellSpec(**job["spec"]), inputs, job["base"])
    specs = [CellSpec(**spec) for spec in job["specs"]]
    subject = Subject(job["base"], specs[0].dtype, inputs)
    for number, spec in enumerate(specs):
        started = time.monotonic()
        outcome = outcome_of(partial(measure_on, subject, spec)) | {"elapsed_s": time.monotonic() - started}
        write_text(Path(job["folder"]) / f"{number}.json", json.dumps(outcome))
        gc.collect()
    return {}


if __name__ == "__main__":
    sys.exit(child_main(_run))
