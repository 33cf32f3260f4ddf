"""What a run tells while it goes: a row per step in `train_log.jsonl`, the tracker of choice, and the progress bar."""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Annotated

import torch
from accelerate import Accelerator
from tqdm import tqdm

from mmpeft_fast.atomic import write_text
from mmpeft_fast.fields import at_least, check_value
from mmpeft_fast.json_text import parse

LOG = "train_log.jsonl"


class TrainLog:
    """Rows of one run. Only the main process writes; a resumed run drops the rows after its checkpoint."""

    def __init__(
        self,
        accelerator: Accelerator,
        output: Path | None,
        *,
        first_step: int,
        num_steps: int,
        every: int,
        progress: bool,
    ) -> None:
        self._accelerator, self._num_steps, self._every = accelerator, num_steps, every
        is_main = accelerator.is_main_process
        self._file = None
        if output is not None and is_main:
            kept = _rows_through(output / LOG, first_step)
            write_text(output / LOG, "".join(kept))
            self._file = open(output / LOG, "a", encoding="utf-8")  # noqa: SIM115, closed by __exit__
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            file=sys.stderr,
            disable=not (progress and is_main),
            dynamic_ncols=True,
        )

    def write(self, row: dict[str, float]) -> None:
        """Move the progress bar by one step; in a logging step, put the row on disk and hand it to the tracker."""
        step = row["step"]
        if step % self._every == 0 or step == self._num_steps:
            if self._file is not None:
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()
            self._accelerator.log({name: value for name, value in row.items() if name != "step"}, step=step)
        self._bar.set_postfix(
            {
                "loss": f"{row['loss']:.4f}",
                "tok/s": f"{row['tokens_per_s']:,.0f}",
                "mem": f"{row['peak_mib'] / 1024:.2f} GiB",
            },
            refresh=False,
        )
        self._bar.update()

    def __enter__(self) -> "TrainLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
        self._accelerator.end_training()


def peak_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: allocated by torch on CUDA, resident in the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # POSIX only, so not at the top

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KiB


def _rows_through(path: Path, step: int) -> list[str]:
    """The log's lines up to a step; what a crash has cut short at its end is dropped.

    Raises ValueError for a line that is no row and has rows behind it.
    """
    if not path.is_file():
        return []
    kept, broken = [], None
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = parse(line.decode("utf-8"), f"{path} line {number}")
            check_value(f"{path} line {number}", row, dict)
            check_value(f"{path} line {number}: step", row.get("step"), Annotated[int, at_least(1)])
        except ValueError as error:
            broken = broken or error
            continue
        if broken is not None:
            raise ValueError(f"{broken}; rows follow it, so no crash has cut it short") from broken
        if row["step"] > step:
            break
        kept.append(line.decode("utf-8"))
    return kept
