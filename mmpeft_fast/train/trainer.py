"""The training loop: exact gradient accumulation, clipping, logging, checkpoints, and a clean stop when asked to end.

The loss of a step is the mean over all supervised tokens of its global batch, however that is cut into micro-batches
and processes: every forward gets the step's token count as `num_items_in_batch` and returns its share of the mean.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
    send_to_device,
    set_seed,
)
from torch import nn

from mmpeft_fast.atomic import exclusive
from mmpeft_fast.data import FEATURES, IGNORE_INDEX, Collator, Packing, Sample, without_hints
from mmpeft_fast.models import base_model, family_of
from mmpeft_fast.peft_model import takes_hints, verify_fused
from mmpeft_fast.small_batches import cut_batch, documents_batch
from mmpeft_fast.train import state
from mmpeft_fast.train.batches import INTERRUPTS, batches_by_step
from mmpeft_fast.train.config import TrainConfig
from mmpeft_fast.train.identity import run_identity
from mmpeft_fast.train.log import LOG, TrainLog, peak_mib
from mmpeft_fast.train.optimization import build_optimizer, cosine_with_warmup
from mmpeft_fast.train.order import SampleOrder
from mmpeft_fast.train.sharding import shard, spread_state, whole


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run did; after a resume `losses` begins at the step that followed the checkpoint."""

    losses: list[float]
    """Mean loss over the supervised tokens of each optimizer step of this call."""
    steps: int
    """Optimizer steps since the run began; so are tokens and time."""
    tokens: int
    """Padding is not counted."""
    supervised_tokens: int
    elapsed_s: float
    checkpoint: Path | None
    interrupted: bool


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on every device."""
    set_seed(seed)


def train(
    model: nn.Module,
    config: TrainConfig,
    dataset: Sequence[Sample],
    collator: Collator,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    cpu: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train the model's trainable parameters in place.

    model: any multimodal causal LM that takes a collator's batch and `num_items_in_batch`; fused or not. output: folder
    for the log and checkpoints, None keeps nothing; one run at a time. resume: continue the same run from output's
    latest checkpoint, bit for bit on the same machine; without one, start. cpu: stay off the accelerator. after_step:
    called with the number of optimizer steps done after each, on every process; its time is not the run's. Ctrl-C,
    SIGTERM and SIGHUP end the run after the current step with a checkpoint; a second one ends it at once. Raises
    ValueError for bad input, before anything is written, OSError where a checkpoint cannot be written (those before it
    stay), and FloatingPointError where loss or gradient is not finite.
    """
    output = None if output is None else Path(output)
    check_output(output, resume=resume)
    check_tracker(config.tracker, output)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no",  # the model's dtype is the compute dtype
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop below accumulates exactly
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=None if output is None else output / "tracking",
    )
    order = SampleOrder(
        num_samples=len(dataset),
        global_batch_size=config.global_batch_size,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        groups=_images_of(dataset) if config.order == "by-image" else None,
        packing=_packing(config.tokens_per_batch, dataset, collator),
    )
    writes = output is not None and accelerator.is_main_process
    with ExitStack() as held:
        if writes and output.exists():
            held.enter_context(exclusive(output))
            check_output(output, resume=resume)  # nobody else has begun in between
        run = _Run(model, config, order, dataset, collator, accelerator, output, resume=resume)
        steps = batches_by_step(
            order,
            run.position.step,
            run.num_steps,
            dataset,
            collator,
            num_workers=config.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        held.enter_context(closing(steps))  # which ends its workers
        batches = next(steps, None)  # collated before the first write: bad data leaves nothing behind
        if writes and not output.exists():
            output.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive(output))
            check_output(output, resume=resume)
        if writes:
            state.clear(output, config.keep_checkpoints)
        if config.tracker != "none":
            settings = {name: value for name, value in asdict(config).items() if value is not None}
            accelerator.init_trackers("mmpeft-fast", config=settings)

        losses: list[float] = []
        interrupted = False
        was_training = model.training
        model.train()
        with (
            TrainLog(
                accelerator,
                output,
                first_step=run.position.step,
                num_steps=run.num_steps,
                every=config.log_every,
                progress=progress,
            ) as log,
            _interrupt_requested() as interrupt_requested,
        ):
            if config.verify:
                run.verify(batches or [])
            run.restore_rng()
            step_begin = time.perf_counter()
            while batches is not None and not interrupted:
                tokens, supervised_tokens = run.sum(*_count(batches))
                loss, grad_norm = run.backward(batches, supervised_tokens)
                share = _kept_share(batches)
                load_begin = time.perf_counter()
                batches = next(steps, None)  # collated while the device still computes
                data_s = time.perf_counter() - load_begin
                row = run.update(float(loss), float(grad_norm))
                now = time.perf_counter()
                row |= run.advance(tokens, supervised_tokens, now - step_begin)
                row |= {"data_s": data_s} | ({} if share is None else {"vision_hits": share})
                step_begin = now
                losses.append(row["loss"])
                log.write(row)
                if after_step is not None:
                    after_step(run.position.step)
                    step_begin = time.perf_counter()
                interrupted = batches is not None and any(run.sum(interrupt_requested.is_set()))
                if config.save_every and run.position.step % config.save_every == 0:
                    run.save()
            run.save()
        model.train(was_training)
    return TrainResult(
        losses=losses,
        steps=run.position.step,
        tokens=run.position.num_tokens,
        supervised_tokens=run.position.num_supervised_tokens,
        elapsed_s=run.position.elapsed_s,
        checkpoint=run.checkpoint,
        interrupted=interrupted,
    )


def check_output(output: Path | None, *, resume: bool) -> None:
    """Raise ValueError where a run's output folder cannot be one: a file, the root, a folder that may not be written,
    with something in the way, or with a run that is not to be resumed."""
    if output is None:
        if resume:
            raise ValueError("resume: expected an output folder to continue from, got none")
        return
    nearest = next(path for path in (output.absolute(), *output.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise ValueError(f"{nearest}: expected a folder for the output, got a file")
    if output.resolve() == Path(output.resolve().anchor):
        raise ValueError(f"{output}: expected a folder of its own for the output, got the root of the file system")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{nearest}: expected a folder that may be written to")
    if not resume and ((output / LOG).exists() or state.latest_checkpoint(output) is not None):
        raise ValueError(f"{output}: expected a folder without a run; resume the one it holds, or choose another")
    if (output / LOG).exists() and not (output / LOG).is_file():
        raise ValueError(f"{output / LOG}: expected a file for the log, a folder is in its place")
    for path in output.glob("checkpoint-*"):
        if not path.is_dir():
            raise ValueError(f"{path}: expected a folder with a checkpoint, a file is in its place")


def check_tracker(tracker: str, output: Path | None) -> None:
    """Raise ValueError unless the tracker is "none", or an installed one of Accelerate's with a folder to write to."""
    if tracker == "none":
        return
    if output is None:
        raise ValueError(f"tracker: expected an output folder for {tracker!r}, got none")
    if tracker not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"tracker: expected none or one of {', '.join(LOGGER_TYPE_TO_CLASS)}, got {tracker!r}")
    if tracker not in [str(available) for available in get_available_trackers()]:
        raise ValueError(f"tracker: expected an installed one, got {tracker!r}; run: pip install {tracker}")


class _Run:
    """Model, optimizer, schedule and position of one run, and what a step does to them."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        order: SampleOrder,
        dataset: Sequence[Sample],
        collator: Collator,
        accelerator: Accelerator,
        output: Path | None,
        *,
        resume: bool,
    ) -> None:
        self.num_steps = config.max_steps or order.num_steps(config.epochs)
        self.identity: dict[str, Any] | None = None
        if output is not None:
            identity = [None]
            if accelerator.is_main_process:
                identity = [
                    run_identity(
                        model,
                        config,
                        dataset,
                        collator,
                        num_processes=order.num_processes,
                        num_steps=self.num_steps,
                        device_type=accelerator.device.type,
                    )
                ]
            (self.identity,) = broadcast_object_list(identity) if accelerator.num_processes > 1 else identity
        self.checkpoint = state.latest_checkpoint(output) if output is not None and resume else None
        self.position = state.Position()
        if self.checkpoint is not None:
            self.position = state.read_position(self.checkpoint, self.identity)

        seed_everything(config.seed + accelerator.process_index)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.shard:
            shard(model.to(accelerator.device))
        optimizer = build_optimizer(
            model,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
            epsilon=config.epsilon,
            connector_parameters=_connector_parameters(model),
            connector_learning_rate=config.connector_learning_rate,
        )
        self._schedule = cosine_with_warmup(optimizer, steps=self.num_steps, warmup_ratio=config.warmup_ratio)
        if config.shard:
            self._prepared, self._optimizer = model, accelerator.prepare(optimizer)
        else:
            self._prepared, self._optimizer = accelerator.prepare(model, optimizer)
        self._model, self._accelerator, self._output = model, accelerator, output
        self._max_grad_norm, self._keep_checkpoints = config.max_grad_norm, config.keep_checkpoints
        self._seed = config.seed
        self._takes_hints = takes_hints(model)
        self._rng_states = None
        if self.checkpoint is not None:
            saved = state.load_checkpoint(self.checkpoint, model)
            self._optimizer.load_state_dict(spread_state(optimizer, saved["optimizer"]))
            self._schedule.load_state_dict(saved["schedule"])
            self._rng_states = saved["rng"]

    def verify(self, batches: list[dict[str, Any]]) -> None:
        """Compare a fused model with itself unfused on a few tokens of the first batch that carries a label, and unfuse
        what differs. Where batches are documents or
        have features for images, on tokens made for the model: in rows of their own, and as documents."""
        labelled = (batch for batch in batches if (batch["labels"][:, 1:] != IGNORE_INDEX).any())
        first = next(labelled, None)
        if first is not None and ("documents" in first or FEATURES in first):
            verify_fused(self._model)
            if "documents" in first:
                verify_fused(self._model, documents_batch(base_model(self._model).config))
        elif first is not None:
            verify_fused(self._model, cut_batch(first))
        self._takes_hints = takes_hints(self._model)

    def restore_rng(self) -> None:
        """Put the generators where the checkpoint left them; the last thing before the first forward. In another
        number of processes they begin anew, as the step says."""
        if self._rng_states is None:
            return
        process, number = self._accelerator.process_index, self._accelerator.num_processes
        if len(self._rng_states) == number:
            state.set_rng_state(self._rng_states[process])
        else:
            seed_everything((self._seed + self.position.step * number + process) % 2**32)

    def sum(self, *counts: int) -> list[int]:
        """Each count summed over all processes."""
        if self._accelerator.num_processes == 1:
            return list(counts)
        return self._accelerator.reduce(torch.tensor(counts, device=self._accelerator.device), "sum").tolist()

    def backward(self, batches: list[dict[str, Any]], num_items: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Accumulate the gradients of the step's mean loss and clip them; returns that loss and the norm before."""
        accelerator = self._accelerator
        total = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(batches):
            inputs = send_to_device(batch, accelerator.device, non_blocking=True)
            if not self._takes_hints:
                inputs = without_hints(inputs)
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(self._prepared):
                loss = self._prepared(**inputs, num_items_in_batch=num_items).loss
                # Data parallel averages gradients over processes; the mean over tokens needs their sum.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach().float()
        grad_norm = whole(accelerator.clip_grad_norm_(self._prepared.parameters(), self._max_grad_norm))
        return (accelerator.reduce(total, "sum") if accelerator.num_processes > 1 else total), grad_norm

    def update(self, loss: float, grad_norm: float) -> dict[str, float]:
        """Apply the step; returns the first fields of its row. Raises FloatingPointError before anything is applied."""
        row = {"step": self.position.step + 1, "loss": loss, "lr": self._schedule.get_last_lr()[0]}
        row["grad_norm"] = grad_norm
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row[name]):
                raise FloatingPointError(
                    f"step {row['step']}: expected a finite {name}, got {row[name]}; this step was not applied, "
                    "try a lower learning rate or fp32"
                )
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return row

    def advance(self, tokens: int, supervised_tokens: int, step_s: float) -> dict[str, float]:
        """Move the position past the step; returns the last fields of its row."""
        self.position = replace(
            self.position,
            step=self.position.step + 1,
            num_tokens=self.position.num_tokens + tokens,
            num_supervised_tokens=self.position.num_supervised_tokens + supervised_tokens,
            elapsed_s=self.position.elapsed_s + step_s,
        )
        return {
            "tokens_per_s": tokens / step_s,
            "supervised_tokens": supervised_tokens,
            "peak_mib": peak_mib(self._accelerator.device),
            "elapsed_s": self.position.elapsed_s,
        }

    def save(self) -> None:
        """Write a checkpoint of the present position, unless there is no output or it is already there."""
        if self._output is None or self.checkpoint == state.checkpoint_folder(self._output, self.position):
            return
        rng_states = gather_object([state.rng_state()])
        parameters = whole({name: each.detach() for name, each in state.trainable_parameters(self._model).items()})
        optimizer_state = whole(self._optimizer.state_dict())
        if self._accelerator.is_main_process:
            state.save_checkpoint(
                self._output,
                self.position,
                self.identity,
                parameters,
                optimizer_state,
                self._schedule.state_dict(),
                rng_states,
            )
            state.clear(self._output, self._keep_checkpoints)
        self.checkpoint = state.checkpoint_folder(self._output, self.position)
        self._accelerator.wait_for_everyone()


def _count(batches: list[dict[str, Any]]) -> tuple[int, int]:
    """Tokens without padding, and next-token targets, in a step's micro-batches."""
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return tokens, sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)


def _kept_share(batches: list[dict[str, Any]]) -> float | None:
    """Of the images in a step's micro-batches, those whose features were there already; None where none are kept."""
    images = [image for batch in batches for image in batch.get(FEATURES, ())]
    return sum("output" in image for image in images) / len(images) if images else None


def _packing(budget: int | None, dataset: Sequence[Sample], collator: Collator) -> Packing | None:
    """Raises ValueError for a sample that alone has more tokens than a batch may."""
    if budget is None:
        return None
    if not hasattr(collator, "packing"):
        kind = type(collator).__name__
        raise ValueError(f"tokens_per_batch: expected a collator that knows the samples' sizes, got {kind}")
    samples = [dataset[index] for index in range(len(dataset))]
    packing = collator.packing(samples, budget)
    for index, sample in enumerate(samples):
        if packing.tokens([index]) > budget:
            raise ValueError(
                f"{sample.source}: expected at most {budget} tokens (tokens_per_batch), got {packing.tokens([index])}; "
                "raise it, or cut samples by max_length"
            )
    return packing


def _images_of(dataset: Sequence[Sample]) -> tuple[int, ...]:
    """A number for each sample, the same for those of one image file; a sample without one has its own."""
    numbers: dict[Any, int] = {}
    images = (dataset[index].image or index for index in range(len(dataset)))
    return tuple(numbers.setdefault(image, len(numbers)) for image in images)


def _connector_parameters(model: nn.Module) -> list[nn.Parameter]:
    family = family_of(model)
    modules = family.modules_at(base_model(model), family.connector)
    return [parameter for module in modules for parameter in module.parameters()]


@contextmanager
def _interrupt_requested() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM or SIGHUP sets; a second one does what it did before, which for Ctrl-C raises
    KeyboardInterrupt. What the process was told to ignore (nohup) stays ignored. Python allows this only in the main
    thread."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    previous = {number: signal.getsignal(number) for number in INTERRUPTS}
    previous = {number: handler for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, frame: Any) -> None:
        requested.set()
        restore()

    for number in previous:
        signal.signal(number, request)
    try:
        yield requested
    finally:
        restore()
