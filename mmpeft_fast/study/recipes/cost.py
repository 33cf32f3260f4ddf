"""What a recipe costs: samples that pass the model, and time and memory as the planner predicts them."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from mmpeft_fast.plan.devices import Device
from mmpeft_fast.plan.prediction import plan
from mmpeft_fast.plan.request import Request
from mmpeft_fast.study.recipes.recipe import Recipe, RecipeCell

_SAME_ARCHITECTURE = {"sharegpt4v-7b": "llava-1.5-7b"}
# Positions of a sample: of LLaVA's, about those of a ScienceQA question; the study pads Qwen's to its maximum.
_LENGTH, _LENGTHS = 650, {"qwen-vl-chat": 2048}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """hours: of all training steps on one `device`, peak_gib: of the cell that needs most; None where they are not
    planned. Evaluation is in neither."""

    trained_samples: int
    evaluated_samples: int
    device: str | None = None
    hours: float | None = None
    peak_gib: float | None = None


class Planner:
    """Plans of cells' steps on a device, each different step once."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._planned: dict[str, tuple[float, int]] = {}

    def step(self, cell: RecipeCell) -> tuple[float, int]:
        """Seconds a sample, and peak bytes."""
        request = Request(
            model=_SAME_ARCHITECTURE.get(cell.model, cell.model),
            method=cell.method,
            settings=cell.settings,
            implementation=cell.implementation,
            batch_size=cell.training["batch_size"],
            seq_len=cell.length or _LENGTHS.get(cell.model, _LENGTH),
            dtype=cell.dtype,
            checkpointing=cell.training.get("gradient_checkpointing", False),
            train=cell.train,
        )
        key = json.dumps(asdict(request), sort_keys=True)
        if key not in self._planned:
            planned = plan(request, self.device)
            self._planned[key] = planned.time.seconds / request.batch_size, planned.counts.peak_bytes
        return self._planned[key]


def cost_of(recipe: Recipe, planner: Planner | None = None, tick: Callable[[], None] = lambda: None) -> Cost:
    """The cost of every cell of a recipe. planner: None counts samples alone, as do models that are built on the spot.
    tick: called before each cell that is planned."""
    counted = {
        "trained_samples": sum(cell.trained_samples for cell in recipe.cells),
        "evaluated_samples": sum(cell.evaluated_samples for cell in recipe.cells),
    }
    if planner is None or any(cell.model.startswith("tiny-") for cell in recipe.cells):
        return Cost(**counted)
    seconds, peak = 0.0, 0
    for cell in recipe.cells:
        if cell.trained_samples:
            tick()
            sample_s, peak_bytes = planner.step(cell)
            seconds, peak = seconds + sample_s * cell.trained_samples, max(peak, peak_bytes)
    return Cost(**counted, device=planner.device.name, hours=seconds / 3600, peak_gib=peak / 2**30)
