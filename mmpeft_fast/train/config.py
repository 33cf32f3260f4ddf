"""What a training run needs to know, with the study's values as defaults (arXiv 2406.05130, training set-up)."""

from dataclasses import dataclass
from typing import Annotated, Any

from mmpeft_fast.fields import above, at_least, below, between, check_fields, one_of
from mmpeft_fast.methods import make_method

# The study's settings for Qwen-VL, where they differ from LLaVA's; taken for every Qwen family.
_QWEN = {"warmup_ratio": 0.01, "weight_decay": 0.1, "beta2": 0.95, "connector_learning_rate": 1e-5}

Positive = Annotated[float, above(0)]
Share = Annotated[float, at_least(0), below(1)]
Count = Annotated[int, at_least(1)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyper-parameters and bookkeeping of one run. Raises ValueError for a value of another type or out of range."""

    learning_rate: Positive = 2e-4
    connector_learning_rate: Positive = 2e-5
    """For the connector's own parameters, where they are trained."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """Only for matrices: never for norms, scales and biases."""
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Positive = 1e-8
    warmup_ratio: Share = 0.03
    max_grad_norm: Positive = 1.0
    epochs: Positive = 3
    max_steps: Count | None = None
    """Optimizer steps; takes precedence over epochs."""
    global_batch_size: Count = 128
    """Samples per optimizer step, over all processes and accumulated micro-batches."""
    batch_size: Count = 16
    """Samples per forward on one process."""
    tokens_per_batch: Count | None = None
    """Tokens per forward on one process, padding included, in place of batch_size: each optimizer step's samples are
    packed into as few batches as first-fit-decreasing finds."""
    order: Annotated[str, one_of("shuffled", "by-image")] = "shuffled"
    """Of samples: each for itself, or those of one image together, so that a batch's samples share their contexts."""
    gradient_checkpointing: bool = False
    shard: bool = False
    """Spreads parameters, gradients and optimizer state over the processes, layer by layer (FSDP2), in place of a whole
    model in each (DDP)."""
    seed: Annotated[int, between(0, 2**32 - 1)] = 42
    num_workers: Annotated[int, between(0, 1024)] = 0
    log_every: Count = 1
    save_every: Annotated[int, at_least(0)] = 500
    """Optimizer steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: Count = 2
    tracker: str = "none"
    verify: bool = True
    """Compares a fused model with itself unfused on a few tokens before the first step, and unfuses what differs."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tokens_per_batch is None and self.global_batch_size % self.batch_size:
            raise ValueError(
                f"global_batch_size: expected a multiple of batch_size {self.batch_size}, got {self.global_batch_size}"
            )

    @classmethod
    def for_study(cls, method: str, family: str, **overrides: Any) -> "TrainConfig":
        """The study's settings for a method and a model family, by their names; overrides win.

        Raises ValueError for an unknown method, or an override of no field.
        """
        unknown = set(overrides) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"training options: expected fields of TrainConfig, got {', '.join(sorted(unknown))}")
        settings = {"learning_rate": make_method(method).learning_rate, **(_QWEN if family.startswith("qwen") else {})}
        return cls(**{**settings, **overrides})
