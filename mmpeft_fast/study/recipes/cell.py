"""A recipe's cell in a process of its own: `python -m mmpeft_fast.study.recipes.cell --spec JSON --out FILE`.

Trains with the package's trainer and evaluates with the data sets' own metrics. A record that cannot be used is left
out, and the row counts it, or it ends the cell (refuse_bad_records).
"""

import json
import math
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from mmpeft_fast import __version__
from mmpeft_fast.atomic import write_text
from mmpeft_fast.data import Collator, SharedContextCollator, why_not_packed
from mmpeft_fast.data.sets import EASY_VQA_SETS, SETS, BadRecords, TaskSample, fitting, load_set
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.json_text import lines, read
from mmpeft_fast.models import base_model, family_of, load_pretrained
from mmpeft_fast.peft_model import add_peft, fuse, study_method, train_parts
from mmpeft_fast.plugins import load_plugins
from mmpeft_fast.stored.baseline import add_baseline
from mmpeft_fast.study.cells import NO_METHOD
from mmpeft_fast.study.metrics import score
from mmpeft_fast.study.process import child_main
from mmpeft_fast.study.recipes.recipe import Data, RecipeCell
from mmpeft_fast.train import TrainConfig, generate_answers, seed_everything, train
from mmpeft_fast.train.log import LOG, peak_mib
from mmpeft_fast.train.sharding import gathered

WARMUP_STEPS = 4  # steps whose time does not count
CHECKPOINTS = 10  # of a training run
MAX_LENGTH = 2048  # tokens, the study's
SHOWN_SENTENCES = 3
_ANSWER_TOKENS = {
    "cider": 64,
    "hallucination": 64,
    "shape_hallucination": 16,
}  # of captions; other answers are a few words
_SHORT_ANSWER_TOKENS = 16


def measure(
    cell: RecipeCell,
    *,
    base: str,
    datasets: str,
    threads: int,
    device: str,
    refuse_bad_records: bool = False,
    folder: Path | None = None,
    micro_batch: int | None = None,
    shard: bool = False,
) -> dict[str, Any]:
    """Runs a cell: the fields of its row.

    base: folder or name of the checkpoint it starts from. datasets: the folder of all data sets. folder: for
    checkpoints and scores, from which a cell goes on that was stopped; None keeps none. micro_batch: samples a forward
    pass, where not the cell's own. shard: whether parameters are spread over the processes that torchrun has started.
    """
    torch.set_num_threads(threads)
    model, processor = load_pretrained(base, dtype=DTYPES[cell.dtype])
    model.to(device)
    bad = BadRecords(skip=not refuse_bad_records)
    collator = _collator(cell, processor)
    plain = Collator(processor, max_length=MAX_LENGTH)
    tests = [(each, _load(each, datasets, plain, cell.seed, bad)) for each in cell.evaluations]
    kept = None if folder is None else folder / "scores.json"
    scores: list[dict[str, Any]] = read(kept) if kept is not None and kept.exists() else []

    def evaluate(epoch: float) -> None:
        scores[:] = [each for each in scores if each["epoch"] < epoch]  # of a try that went further than its checkpoint
        for data, samples in tests:
            metric = data.metric or _set_of(data).metric
            tokens = _ANSWER_TOKENS.get(metric, _SHORT_ANSWER_TOKENS)
            said = _answers(model, plain, samples, tokens, shard=shard)
            scores.append({"epoch": epoch, "set": data.name, "metric": metric, **score(metric, said, samples)})
        if kept is not None and int(os.environ.get("RANK", 0)) == 0:
            write_text(kept, json.dumps(scores))

    row: dict[str, Any] = {"baseline": "transformers"}
    if cell.method == NO_METHOD:
        evaluate(0)
    else:
        samples = _training_samples(cell, datasets, plain, bad)
        model, row["baseline"] = _prepare(model, cell)
        row |= _train(
            model, cell, samples, collator, evaluate, device, folder=folder, micro_batch=micro_batch, shard=shard
        )
    parameters = list(model.parameters())
    return row | {
        "trainable_params": sum(p.numel() for p in parameters if p.requires_grad) if cell.method != NO_METHOD else 0,
        "total_params": sum(p.numel() for p in parameters),
        "scores": scores,
        "num_bad_records": len(bad),
        "bad_records": bad.sentences[:SHOWN_SENTENCES],
    }


def _answers(model: nn.Module, collator: Collator, samples: list, tokens: int, *, shard: bool) -> list[str]:
    """The model's answers: each process's to its own share of the samples, or to all where it has a share of the model
    and no pass without the others."""
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if world == 1 or shard:
        with gathered(model) if shard else nullcontext():
            return generate_answers(model, collator, samples, max_new_tokens=tokens)
    mine = generate_answers(model, collator, samples[rank::world], max_new_tokens=tokens)
    numbered = gather_object(list(zip(range(rank, len(samples), world), mine, strict=True)))
    return [answer for _, answer in sorted(numbered)]


def _set_of(data: Data):
    return {**SETS, **EASY_VQA_SETS}[data.name]


def _load(data: Data, datasets: str, collator: Collator, seed: int, bad: BadRecords) -> list[TaskSample]:
    samples = load_set(_set_of(data), datasets, data.split, limit=data.limit, seed=seed, bad=bad)
    return fitting(samples, collator, bad)


def _training_samples(cell: RecipeCell, datasets: str, collator: Collator, bad: BadRecords) -> list[TaskSample]:
    """The cell's samples; of several questions an image, whole groups of so many."""
    if cell.questions_per_image == 1:
        return _load(cell.data, datasets, collator, cell.seed, bad)
    by_image = defaultdict(list)
    for sample in load_set(_set_of(cell.data), datasets, cell.data.split, seed=cell.seed, bad=bad):
        by_image[sample.image].append(sample)
    wanted = cell.questions_per_image
    groups = [group[:wanted] for group in by_image.values() if len(group) >= wanted]
    random.Random(cell.seed).shuffle(groups)
    return fitting((sample for group in groups[: cell.data.num_samples // wanted] for sample in group), collator, bad)


def _collator(cell: RecipeCell, processor: Any) -> Collator:
    shares = cell.questions_per_image > 1 and cell.implementation == "fused" and why_not_packed(processor) is None
    kind = SharedContextCollator if shares else Collator
    return kind(processor, max_length=max(MAX_LENGTH, cell.length or 0), multiple_of=cell.length or 1)


def _prepare(model: nn.Module, cell: RecipeCell) -> tuple[nn.Module, str]:
    """The model with its method and the further parts that are trained, and whose code runs it."""
    method = study_method(model, cell.method, **cell.settings)
    seed_everything(cell.seed)
    model.requires_grad_(False)
    connector = "connector" in cell.train
    if cell.implementation == "peft":
        model, implementation = add_baseline(model, method, train_connector=connector)
    else:
        model, implementation = add_peft(model, method, train_connector=connector), f"mmpeft-fast {__version__}"
    plain = base_model(model)
    train_parts(plain, family_of(plain), set(cell.train) - {"connector"})
    return (fuse(model) if cell.implementation == "fused" else model), implementation


def _train(
    model: nn.Module,
    cell: RecipeCell,
    samples: list,
    collator: Collator,
    evaluate: Callable[[float], None],
    device: str,
    *,
    folder: Path | None,
    micro_batch: int | None,
    shard: bool,
) -> dict:
    order = {"order": "by-image"} if cell.questions_per_image > 1 else {}
    family = family_of(base_model(model)).name
    config = TrainConfig.for_study(cell.method, family, seed=cell.seed, **{**order, **cell.training, "shard": shard})
    # A cell's micro-batch is that of all processes together, so that it can go on in another number of them.
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    share = max(1, config.global_batch_size // num_processes)
    largest = max(1, (config.batch_size if micro_batch is None else micro_batch) // num_processes)
    config = replace(config, batch_size=next(size for size in range(largest, 0, -1) if share % size == 0))
    steps_per_epoch = math.ceil(len(samples) / config.global_batch_size)
    num_steps = config.max_steps or math.ceil(config.epochs * steps_per_epoch)
    config = replace(config, save_every=max(1, num_steps // CHECKPOINTS))
    every = num_steps if cell.evaluate_every is None else max(1, round(cell.evaluate_every * steps_per_epoch))
    step_s: list[float] = []
    started = time.perf_counter()

    def after_step(step: int) -> None:
        nonlocal started
        step_s.append(time.perf_counter() - started)
        if step % every == 0 or step == num_steps:
            evaluate(round(step / steps_per_epoch, 2))
        started = time.perf_counter()

    # Which micro-batches a step is cut into is part of a run.
    output = None if folder is None else folder / f"train-{config.batch_size * num_processes}"
    result = train(
        model, config, samples, collator, output=output, resume=output is not None, progress=False,
        cpu=device == "cpu", after_step=after_step,
    )  # fmt: skip
    if result.interrupted:
        raise ValueError(f"the process was asked to end after step {result.steps} of {num_steps}")
    # Nothing is left to be timed where a cell was stopped between its last step and its end.
    step_ms = statistics.median(step_s[min(WARMUP_STEPS, len(step_s) - 1) :]) * 1e3 if step_s else None
    tokens = result.tokens / result.steps
    losses = result.losses if output is None else [row["loss"] for _, row in lines(output / LOG)]
    return {
        "micro_batch": config.batch_size * num_processes,
        "steps": result.steps,
        "num_samples": len(samples),
        "step_ms_p50": step_ms,
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / step_ms * 1e3 if step_ms else None,
        "peak_mib": peak_mib(torch.device(device)),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def _cell_of(fields: dict) -> RecipeCell:
    """A cell from JSON."""
    data = None if fields["data"] is None else Data(**fields["data"])
    evaluations = tuple(Data(**each) for each in fields["evaluations"])
    return RecipeCell(**{**fields, "data": data, "evaluations": evaluations, "train": tuple(fields["train"])})


def _run(job: dict) -> dict:
    load_plugins()
    options = {name: value for name, value in job.items() if name not in ("spec", "folder")}
    return measure(_cell_of(job["spec"]), folder=Path(job["folder"]), **options)


if __name__ == "__main__":
    sys.exit(child_main(_run))
