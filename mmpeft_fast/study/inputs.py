"""The study's samples and batches: easy-vqa or a user's conversations, through one loader, the same for every cell."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmpeft_fast.data import Sample, easy_vqa_conversations, load_conversations

# More than a run of the default size draws, and still loaded in well under a second.
TRAIN_SAMPLES = 8000


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Where a cell finds its conversations. Without `eval_json`, eval_samples of the training file are held out."""

    train_json: str
    train_images: str
    eval_json: str | None = None
    eval_images: str | None = None


def prepare_inputs(folder: Path, *, data: Path | None, images: Path | None, eval_samples: int, seed: int) -> Inputs:
    """Checks the user's conversations, or converts easy-vqa into `folder` once.

    Raises ValueError for a file that the loader refuses, or too few conversations to hold eval_samples out.
    """
    if data is not None:
        size = len(load_conversations(data, images))
        if size < 2 * eval_samples:
            raise ValueError(
                f"{data}: expected at least {2 * eval_samples} conversations, twice --eval-samples, got {size}"
            )
        return Inputs(train_json=str(data.resolve()), train_images=str(images.resolve()))
    train_json, train_images = easy_vqa_conversations(folder, "train", limit=TRAIN_SAMPLES, seed=seed)
    eval_json, eval_images = easy_vqa_conversations(folder, "test", limit=eval_samples, seed=seed)
    return Inputs(
        train_json=str(train_json),
        train_images=str(train_images),
        eval_json=str(eval_json),
        eval_images=str(eval_images),
    )


def load_samples(inputs: Inputs, *, eval_samples: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on and samples to evaluate, disjoint."""
    train = load_conversations(inputs.train_json, inputs.train_images)
    if inputs.eval_json is not None:
        return train, load_conversations(inputs.eval_json, inputs.eval_images)
    return train[:-eval_samples], train[-eval_samples:]


def sample_batches(samples: list[Sample], *, batch_size: int, steps: int, seed: int) -> Iterator[list[Sample]]:
    """`steps` batches of `batch_size` samples, in an order that depends on the seed alone, epoch after epoch."""
    generator = random.Random(seed)
    order: list[Sample] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += generator.sample(samples, len(samples))
        batch, order = order[:batch_size], order[batch_size:]
        yield batch
