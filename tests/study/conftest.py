"""Conversations on disk for the study, rows as its cells leave them, and a run whose jobs are faked."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mmpeft_fast.study import in_turn
from mmpeft_fast.study import run as run_module
from mmpeft_fast.study.cells import StudyConfig, plan
from mmpeft_fast.study.run import run_study

COLORS = ("red", "blue", "green")


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> tuple[Path, Path]:
    """A user's own data: (file, image folder), 24 questions about one-coloured images."""
    folder = tmp_path_factory.mktemp("user_data")
    for color in COLORS:
        Image.new("RGB", (64, 64), color).save(folder / f"{color}.png")
    entries = [
        {
            "id": str(index),
            "image": f"{COLORS[index % 3]}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nwhat color is shape {index}?"},
                {"from": "gpt", "value": COLORS[index % 3]},
            ],
        }
        for index in range(24)
    ]
    path = folder / "conversations.json"
    path.write_text(json.dumps(entries))
    return path, folder


@pytest.fixture
def config(tmp_path, conversations) -> StudyConfig:
    """Two models, two methods: ten cells and two bases."""
    data, images = conversations
    return StudyConfig(output=tmp_path / "out", methods=("lora", "ia3"), data=data, images=images, eval_samples=4)


def measured(step_ms: float = 20.0, losses=(2.0, 1.5, 1.0)) -> dict:
    """What a cell measures, made up."""
    return {
        "status": "success",
        "baseline": "HF PEFT 1.0",
        "trainable_params": 312320,
        "total_params": 3604672,
        "tokens_per_step": 900.0,
        "padded_tokens_per_step": 960.0,
        "supervised_tokens_per_step": 16.0,
        "step_ms_p50": step_ms,
        "frozen_step_ms_p50": 10.0,
        "peak_mib": 80.0,
        "saved_mib": 2 * step_ms,
        "losses": list(losses),
        "accuracy": 0.625,
    }


class FakeJobs:
    """Stands in for run_job: answers at once, remembers what ran, and fails or is interrupted where it is told to."""

    def __init__(self):
        self.names: list[str] = []
        self.fail: dict[str, str] = {}  # name -> reason
        self.interrupt_at: str | None = None
        self.oom: str | None = None

    def __call__(self, job, tick=lambda: None) -> dict:
        module, job = job.module, job.spec
        spec = job["spec"]
        name = " ".join([spec["model"], *(spec[key] for key in ("method", "implementation") if key in spec)])
        if name == self.interrupt_at:
            raise KeyboardInterrupt
        tick()
        self.names.append(name)
        if name == self.oom:
            return {"status": "oom", "reason": "MemoryError"}
        if name in self.fail:
            return {"status": "failed", "reason": self.fail[name]}
        if module.endswith(".base"):
            Path(job["folder"]).mkdir()
            return {"status": "success"}
        return measured(step_ms=10.0 if spec["implementation"] == "frozen" else 20.0)


@pytest.fixture
def jobs(monkeypatch) -> FakeJobs:
    fake = FakeJobs()
    monkeypatch.setattr(run_module, "run_job", fake)
    monkeypatch.setattr(in_turn, "run_fitting", fake)
    return fake


@pytest.fixture
def rows(config, jobs) -> list[dict]:
    """The rows of a whole run, one of them failed."""
    jobs.fail["tiny-qwen2-vl ia3 peft"] = "ValueError: expected <this>, got that"
    rows = run_study(config)
    assert len(rows) == len(plan(config)[1])
    return rows
