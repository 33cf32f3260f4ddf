"""A tiny base model in a process of its own: `python -m mmpeft_fast.study.base --spec JSON --out FILE`.

On easy-vqa it grows up as real ones do: the tower and the connector learn to tell what is in an image, the decoder then
learns captions and one type of questions, on tower and connector as they then are. Other types it never meets. On a
user's own conversations the connector and decoder are trained for a moment on part of the answers. Saves model and
processor as any checkpoint: the cells load it the way they load a real one.
"""

import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpeft_fast.atomic import new_folder
from mmpeft_fast.data import Collator, Sample, train_tokenizer
from mmpeft_fast.data.sets import EASY_VQA_SETS, load_set
from mmpeft_fast.models import FAMILIES, family_of, tiny_model, tiny_processor
from mmpeft_fast.study.cells import TINY_MODELS, BaseSpec
from mmpeft_fast.study.inputs import CAPTIONS, TASKS, Inputs, load_samples, sample_batches
from mmpeft_fast.study.process import child_main
from mmpeft_fast.study.steps import inputs_for
from mmpeft_fast.train import cosine_with_warmup, seed_everything

VOCAB_SIZE = 512
BATCH_SIZE = 16
LEARNING_RATE = 1e-3
TOWER_BATCH_SIZE = 32
WARMUP_RATIO = 0.05
BETAS = (0.9, 0.98)
MAX_GRAD_NORM = 1.0


def build_base(spec: BaseSpec, inputs: Inputs, *, eval_samples: int, threads: int, folder: Path) -> None:
    """Makes the base of `spec` and saves it as `folder`, whole or not at all.

    Args:
        spec: the base; without pretrain_steps it is as random as it was built.
        inputs: where the conversations are.
        eval_samples: conversations held out of the user's own.
        threads: CPU threads.
        folder: must not exist.
    """
    torch.set_num_threads(threads)
    seed_everything(spec.seed)
    family = TINY_MODELS[spec.model]
    is_easy = inputs.train_json is None
    if is_easy:
        # The tokenizer has read everything, the model only what it is trained on.
        read = load_set(EASY_VQA_SETS["easy-vqa"], "", "train", limit=8000)
        captions, trained = (load_set(EASY_VQA_SETS[name], "", "train") for name in (CAPTIONS, TASKS["seen"]))
        read += captions
    else:
        read, _ = load_samples(inputs, "", eval_samples=eval_samples)
    tokenizer = train_tokenizer(read, FAMILIES[family].special_tokens, vocab_size=VOCAB_SIZE)
    processor = tiny_processor(family, tokenizer)
    model = tiny_model(family, tokenizer, seed=spec.seed)
    collator = Collator(processor)
    if spec.pretrain_steps and is_easy:
        _train_sight(model, collator, captions, spec)
        mixed = zip(*(_batches(part, BATCH_SIZE // 2, spec) for part in (captions, trained)))
        _train_language(model, collator, (one + other for one, other in mixed), spec, frozen=_sight(model))
    elif spec.pretrain_steps:
        batches = _batches(_commoner_half(read), BATCH_SIZE, spec)
        _train_language(model, collator, batches, spec, frozen=_parts(model, family_of(model).vision_tower))
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def _batches(samples: list[Sample], batch_size: int, spec: BaseSpec) -> Iterator[list[Sample]]:
    """In another order than the cells', whose batches follow the seed itself."""
    return sample_batches(samples, batch_size=batch_size, steps=spec.pretrain_steps, seed=spec.seed + 1)


def _parts(model: nn.Module, paths: tuple[str, ...]) -> list[nn.Module]:
    return family_of(model).modules_at(model, paths)


def _sight(model: nn.Module) -> list[nn.Module]:
    """Tower and connector."""
    family = family_of(model)
    return _parts(model, family.vision_tower) + _parts(model, family.connector)


def _train_sight(model: nn.Module, collator: Collator, captions: list[Sample], spec: BaseSpec) -> None:
    """Trains tower and connector to name each word of an image's caption, from the mean of its features."""
    words = [sample.answers[0].split()[1:] for sample in captions]  # without the article
    known = [sorted(set(column)) for column in zip(*words)]
    targets = torch.tensor([[names.index(word) for names, word in zip(known, each)] for each in words])
    pixels, grids = _pixels(collator, captions)
    heads = nn.ModuleList(nn.Linear(model.get_input_embeddings().embedding_dim, len(names)) for names in known)
    parts = [*_sight(model), heads]
    num_steps = spec.tower_epochs * (len(captions) // TOWER_BATCH_SIZE)
    step = _stepper([p for part in parts for p in part.parameters()], num_steps)
    generator = random.Random(spec.seed)
    model.train()
    for epoch in range(spec.tower_epochs):
        order = generator.sample(range(len(captions)), len(captions))
        losses = []
        for start in range(0, len(order) - TOWER_BATCH_SIZE + 1, TOWER_BATCH_SIZE):
            chosen = order[start : start + TOWER_BATCH_SIZE]
            grid = {} if grids is None else {"image_grid_thw": grids[chosen]}
            seen = _mean_features(model, torch.cat([pixels[i] for i in chosen]), len(chosen), grid)
            loss = sum(
                functional.cross_entropy(head(seen), column) for head, column in zip(heads, targets[chosen].unbind(1))
            )
            losses.append(step(loss))
        print(f"sight, epoch {epoch} of {spec.tower_epochs}: loss {sum(losses) / len(losses):.3f}", flush=True)


def _pixels(collator: Collator, samples: list[Sample]) -> tuple[list[Tensor], Tensor | None]:
    """Each sample's share of `pixel_values`, and the grids [N, 3] of models that want them; images of one size."""
    pixels, grids = [], []
    for start in range(0, len(samples), 64):
        chunk = samples[start : start + 64]
        batch = collator(chunk)
        pixels += batch["pixel_values"].chunk(len(chunk))
        grids += [batch["image_grid_thw"]] if "image_grid_thw" in batch else []
    return pixels, torch.cat(grids) if grids else None


def _mean_features(model: nn.Module, pixels: Tensor, number: int, grid: dict[str, Tensor]) -> Tensor:
    """[number, H]: the mean over each image's positions of what the decoder gets."""
    features = model.base_model.get_image_features(pixels, **grid)
    features = getattr(features, "pooler_output", features)
    if not isinstance(features, Tensor):
        features = torch.cat(list(features))
    return features.reshape(number, -1, features.shape[-1]).mean(1)


def _train_language(
    model: nn.Module, collator: Collator, batches: Iterator[list[Sample]], spec: BaseSpec, *, frozen: list[nn.Module]
) -> None:
    """Trains all but `frozen`, on the answers and, with the same weight, on all of the text, so that it knows words
    beyond its answers; prints the loss now and then for the log."""
    model.train().requires_grad_(True)
    for part in frozen:
        part.requires_grad_(False)
    step = _stepper([p for p in model.parameters() if p.requires_grad], spec.pretrain_steps)
    image_token = collator.tokenizer.convert_tokens_to_ids(collator.processor.image_token)
    for index, batch in enumerate(batches):
        inputs = inputs_for(model, collator(batch))
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        ids = inputs["input_ids"]
        is_text = (inputs["attention_mask"] == 1) & (ids != image_token)
        answers, text = (each[:, 1:].flatten() for each in (labels, ids.where(is_text, -100)))
        loss = step(functional.cross_entropy(logits, answers) + functional.cross_entropy(logits, text))
        if index % 10 == 0:
            print(f"language, step {index} of {spec.pretrain_steps}: loss {loss:.3f}", flush=True)


def _stepper(parameters: list[nn.Parameter], num_steps: int):
    """A function that takes a loss [], makes an AdamW step and returns the loss's value."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)
    scheduler = cosine_with_warmup(optimizer, steps=num_steps, warmup_ratio=WARMUP_RATIO)

    def step(loss: Tensor) -> float:
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _commoner_half(samples: list[Sample]) -> list[Sample]:
    """The samples with the commonest answers, at least half of all.

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
