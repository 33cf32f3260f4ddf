"""Training on Hugging Face Accelerate: configuration, the loop, exact resume, accuracy, and answers."""

from mmpeft_fast.train.config import TrainConfig
from mmpeft_fast.train.evaluate import evaluate_accuracy, generate_answers
from mmpeft_fast.train.optimization import build_optimizer, cosine_with_warmup
from mmpeft_fast.train.order import SampleOrder
from mmpeft_fast.train.trainer import TrainResult, seed_everything, train

__all__ = [
    "SampleOrder",
    "TrainConfig",
    "TrainResult",
    "build_optimizer",
    "cosine_with_warmup",
    "evaluate_accuracy",
    "generate_answers",
    "seed_everything",
    "train",
]
