"""A peer that changes transformers' classes for its whole process, in a process of its own that takes its turns.

`python -m bench.suite.peers` is that process: requests and answers are pickles on its standard input and output. A turn
is timed as its answer takes, the GPU waited for.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from bench.gpu import real_peers

ROOT = Path(__file__).parents[2]


class PeerTrial:
    """What a `Trial` does, done by a peer from the same weights. Usable as a context, which ends the process.

    Raises:
        RuntimeError: the peer does not run; the sentence is its own.
    """

    def __init__(self, case, implementation, model: nn.Module, device: str):
        self.case, self.implementation, self._device = case, implementation, device
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.suite.peers"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="weights-") as folder:
            weights = Path(folder) / "weights.pt"
            torch.save(model.state_dict(), weights)
            try:
                self._ask("start", implementation.peer, asdict(case), device, str(weights))
            except RuntimeError:
                self.close()
                raise

    def __enter__(self) -> "PeerTrial":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _ask(self, what: str, *arguments: object) -> object:
        try:
            pickle.dump((what, arguments), self._process.stdin)
            self._process.stdin.flush()
            is_answer, value = pickle.load(self._process.stdout)
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{self.implementation.peer}: its process ended at {what}") from error
        if not is_answer:
            raise RuntimeError(value)
        return value

    def run(self) -> None:
        self._ask("run")

    def outcome(self) -> dict[str, torch.Tensor | None]:
        found = self._ask("outcome")
        return {name: None if tensor is None else tensor.to(self._device) for name, tensor in found.items()}

    def memory(self) -> dict[str, float]:
        return self._ask("memory")


class _Served:
    """The peer's side. fields: of the case; a peer wants to be imported before transformers, and so before `Case`."""

    def __init__(self, name: str, fields: dict, device: str, weights: str):
        self.folder = tempfile.TemporaryDirectory(prefix="peer-")
        missing = real_peers.load(name, None, Path(self.folder.name))
        if missing:
            raise RuntimeError(missing)
        from bench.suite.cases import Case, stock
        from bench.suite.implementations import Implementation
        from bench.suite.trials import Trial, baseline

        case = Case(**fields)
        kept = torch.load(weights, map_location=device)
        if name == "unsloth":
            setting = SimpleNamespace(length=case.seq_len, r=case.rank, dropout=case.dropout)
            model = real_peers.unsloth_model(stock(case, device), setting)
        else:
            model = baseline(case, device)
        unexpected = set(model.load_state_dict(kept, strict=False).unexpected_keys)
        if unexpected:
            raise RuntimeError(
                f"{name}: expected HF PEFT's names of parameters, got others than {sorted(unexpected)[:3]}"
            )
        # Unsloth's own adapters are float32, and its trainer runs it under autocast.
        self.autocast = torch.autocast(device, enabled=name == "unsloth")
        self.trial = Trial(case, Implementation(narrow=name != "unsloth", is_opaque=True), model, device)

    def run(self) -> None:
        with self.autocast:
            self.trial.run()
        if self.trial.device == "cuda":
            torch.cuda.synchronize()

    def outcome(self) -> dict:
        with self.autocast:
            found = self.trial.outcome()
        return {name: None if tensor is None else tensor.cpu() for name, tensor in found.items()}

    def memory(self) -> dict[str, float]:
        with self.autocast:
            return self.trial.memory()


def main() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a peer prints is no answer
    served: _Served | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            what, arguments = pickle.load(sys.stdin.buffer)
            try:
                if what == "start":
                    served = _Served(*arguments)
                    answer = True, None
                else:
                    answer = True, getattr(served, what)()
            except Exception as error:  # anything that another project's code may raise becomes a row
                answer = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            pickle.dump(answer, answers)
            answers.flush()


if __name__ == "__main__":
    main()
