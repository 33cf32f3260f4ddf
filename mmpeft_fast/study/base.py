"""A tiny base model in a process of its own: `python -m mmpeft_fast.study.base --spec JSON --out FILE`.

Trains connector, decoder and head from random weights for a moment, on part of the answers, so that the cells start
from something that can answer and have something left to learn. Saves model and processor as any checkpoint: the cells
load it the way they load a real one.
"""

import sys
from collections import Counter
from pathlib import Path

import torch

from mmpeft_fast.atomic import new_folder
from mmpeft_fast.data import Collator, Sample, train_tokenizer
from mmpeft_fast.models import FAMILIES, family_of, tiny_model, tiny_processor
from mmpeft_fast.study.cells import TINY_MODELS, BaseSpec
from mmpeft_fast.study.inputs import Inputs, load_samples, sample_batches
from mmpeft_fast.study.process import child_main
from mmpeft_fast.study.steps import inputs_for, training_steps
from mmpeft_fast.train import seed_everything

VOCAB_SIZE = 512
BATCH_SIZE = 8
LEARNING_RATE = 1e-3


def build_base(spec: BaseSpec, inputs: Inputs, *, eval_samples: int, threads: int, folder: Path) -> None:
    """Makes the base of `spec` and saves it as `folder`, whole or not at all.

    Args:
        spec: the base.
        inputs: where the conversations are.
        eval_samples: conversations held out where inputs name no evaluation file.
        threads: CPU threads.
        folder: must not exist.
    """
    torch.set_num_threads(threads)
    seed_everything(spec.seed)
    family = TINY_MODELS[spec.model]
    samples, _ = load_samples(inputs, eval_samples=eval_samples)
    tokenizer = train_tokenizer(samples, FAMILIES[family].special_tokens, vocab_size=VOCAB_SIZE)
    processor = tiny_processor(family, tokenizer)
    model = tiny_model(family, tokenizer, seed=spec.seed)
    _train(model, Collator(processor), samples, spec)
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def _train(model: torch.nn.Module, collator: Collator, samples: list[Sample], spec: BaseSpec) -> None:
    """Trains everything but the vision tower; prints the loss now and then for the log."""
    if spec.pretrain_steps == 0:
        return
    family = family_of(model)
    model.train().requires_grad_(True)
    for tower in family.modules_at(model, family.vision_tower):
        tower.requires_grad_(False)
    step = training_steps(model, learning_rate=LEARNING_RATE, num_steps=spec.pretrain_steps)
    # Another order than the cells', whose batches follow the seed itself.
    seed = spec.seed + 1
    batches = sample_batches(_commoner_half(samples), batch_size=BATCH_SIZE, steps=spec.pretrain_steps, seed=seed)
    for index, batch in enumerate(batches):
        loss = step(inputs_for(model, collator(batch)))
        if index % 10 == 0:
            print(f"step {index} of {spec.pretrain_steps}: loss {loss.item():.3f}", flush=True)


def _commoner_half(samples: list[Sample]) -> list[Sample]:
    """The samples with the commonest answers, at least half of all (of easy-vqa: yes and no).

    A base that has seen every answer leaves nothing to learn in a few steps: losses would show the batches' noise only.
    """
    counts = Counter(sample.answers for sample in samples)
    kept: set[tuple[str, ...]] = set()
    num_kept = 0
    for answers, number in counts.most_common():
        if 2 * num_kept >= len(samples):
            break
        kept.add(answers)
        num_kept += number
    return [sample for sample in samples if sample.answers in kept]


def _run(job: dict) -> dict:
    build_base(
        BaseSpec(**job["spec"]),
        Inputs(**job["inputs"]),
        eval_samples=job["eval_samples"],
        threads=job["threads"],
        folder=Path(job["folder"]),
    )
    return {}


if __name__ == "__main__":
    sys.exit(child_main(_run))
