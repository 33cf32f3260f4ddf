"""The study's samples and batches: easy-vqa or a user's conversations, through one loader, the same for every cell."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmpeft_fast.data import Sample, load_conversations
from mmpeft_fast.data.easy_vqa import package_folder
from mmpeft_fast.data.sets import EASY_VQA_SETS, load_set

# More than a run of the default size draws, and still loaded in well under a second.
TRAIN_SAMPLES = 2000
# easy-vqa's question types: the tiny bases are trained on the first and, before that, on captions; they never meet the
# other.
TASKS = {"seen": "easy-vqa-shape", "unseen": "easy-vqa-color"}
CAPTIONS = "easy-vqa-caption"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The user's conversations, of which the cells hold some out; without a file, easy-vqa's `TASKS`."""

    train_json: str | None = None
    train_images: str | None = None


def prepare_inputs(*, data: Path | None, images: Path | None, eval_samples: int) -> Inputs:
    """Checks the user's conversations, or that easy-vqa is installed.

    Raises ValueError for a file that the loader refuses, too few conversations to hold eval_samples out, and a missing
    package.
    """
    if data is None:
        package_folder()
        return Inputs()
    size = len(load_conversations(data, images))
    if size < 2 * eval_samples:
        raise ValueError(
            f"{data}: expected at least {2 * eval_samples} conversations, twice --eval-samples, got {size}"
        )
    return Inputs(train_json=str(data.resolve()), train_images=str(images.resolve()))


def load_samples(inputs: Inputs, task: str, *, eval_samples: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on and samples to evaluate, disjoint. task: a name in `TASKS`; the user's data have no such."""
    if inputs.train_json is None:
        data_set = EASY_VQA_SETS[TASKS[task]]
        train = load_set(data_set, "", "train", limit=TRAIN_SAMPLES)
        return train, load_set(data_set, "", "test", limit=eval_samples)
    samples = load_conversations(inputs.train_json, inputs.train_images)
    return samples[:-eval_samples], samples[-eval_samples:]


def majority_accuracy(inputs: Inputs, task: str, *, eval_samples: int) -> float:
    """How often the commonest answer of the training samples is right."""
    train, evaluation = load_samples(inputs, task, eval_samples=eval_samples)
    [(answers, _)] = Counter(sample.answers for sample in train).most_common(1)
    return sum(sample.answers == answers for sample in evaluation) / len(evaluation)


def sample_batches(samples: list[Sample], *, batch_size: int, steps: int, seed: int) -> Iterator[list[Sample]]:
    """`steps` batches of `batch_size` samples, in an order that depends on the seed alone, epoch after epoch."""
    generator = random.Random(seed)
    order: list[Sample] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += generator.sample(samples, len(samples))
        batch, order = order[:batch_size], order[batch_size:]
        yield batch
