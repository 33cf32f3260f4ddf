"""What a training run needs to know, with the study's values as defaults (arXiv 2406.05130, training set-up)."""

import math
from dataclasses import dataclass
from typing import Any

# The study gives the first four. For LayerNorm-tuning (arXiv 2312.11420) we take IA3's, the other method of gains.
LEARNING_RATES = {
    "lora": 2e-4,
    "adapter": 5e-5,
    "ia3": 2e-4,
    "prefix": 1e-5,
    "layernorm": 2e-4,
    "layernorm-simp": 2e-4,
}
# The study's settings for Qwen-VL, where they differ from LLaVA's; taken for every Qwen family.
_QWEN = {"warmup_ratio": 0.01, "weight_decay": 0.1, "beta2": 0.95, "connector_learning_rate": 1e-5}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyper-parameters and bookkeeping of one run. Raises ValueError for a value out of range."""

    learning_rate: float = 2e-4
    connector_learning_rate: float = 2e-5
    """For the connector's own parameters, where they are trained."""
    weight_decay: float = 0.0
    """Only for matrices: never for norms, scales and biases."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    epochs: float = 3
    max_steps: int | None = None
    """Optimizer steps; takes precedence over epochs."""
    global_batch_size: int = 128
    """Samples per optimizer step, over all processes and accumulated micro-batches."""
    batch_size: int = 16
    """Samples per forward on one process."""
    gradient_checkpointing: bool = False
    seed: int = 42
    num_workers: int = 0
    log_every: int = 1
    save_every: int = 500
    """Optimizer steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: int = 2
    tracker: str = "none"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "connector_learning_rate", "epsilon", "max_grad_norm", "epochs"):
            self._check(name, lambda value: value > 0, "a number above 0")
        self._check("weight_decay", lambda value: value >= 0, "a number of at least 0")
        for name in ("beta1", "beta2", "warmup_ratio"):
            self._check(name, lambda value: 0 <= value < 1, "a number from 0 to below 1")
        for name in ("global_batch_size", "batch_size", "log_every", "keep_checkpoints"):
            self._check(name, lambda value: value >= 1, "a whole number of at least 1", whole=True)
        for name in ("seed", "num_workers", "save_every"):
            self._check(name, lambda value: value >= 0, "a whole number of at least 0", whole=True)
        if self.max_steps is not None:
            self._check("max_steps", lambda value: value >= 1, "a whole number of at least 1", whole=True)
        if self.global_batch_size % self.batch_size:
            raise ValueError(
                f"global_batch_size: expected a multiple of batch_size {self.batch_size}, got {self.global_batch_size}"
            )

    def _check(self, name: str, holds: Any, expected: str, *, whole: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and holds(value)):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")

    @classmethod
    def for_study(cls, method: str, family: str, **overrides: Any) -> "TrainConfig":
        """The study's settings for a method and a model family, by their names; overrides win.

        Raises ValueError for a method the study's table does not have, or an override of no field.
        """
        if method not in LEARNING_RATES:
            raise ValueError(f"method: expected one of {', '.join(LEARNING_RATES)}, got {method!r}")
        unknown = set(overrides) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"training options: expected fields of TrainConfig, got {', '.join(sorted(unknown))}")
        settings = {"learning_rate": LEARNING_RATES[method], **(_QWEN if family.startswith("qwen") else {})}
        return cls(**{**settings, **overrides})
