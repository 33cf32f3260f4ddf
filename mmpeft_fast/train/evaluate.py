"""Exact-match accuracy by teacher forcing, and what a model answers by itself.

A sample is right if, fed with the true answer, the model's most likely token is the true one at every answer position,
end token included. That is so exactly when greedy generation writes that answer and stops, so one forward replaces a
generation loop. Metrics that read answers need the loop: `generate_answers`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from mmpeft_fast.contexts import num_alike
from mmpeft_fast.data import HOST_HINTS, IGNORE_INDEX, Collator, Sample
from mmpeft_fast.models import base_model, family_of
from mmpeft_fast.patch_grids import take_images


@torch.inference_mode()
def evaluate_accuracy(
    model: nn.Module, collator: Collator, samples: Sequence[Sample], *, batch_size: int = 32
) -> float:
    """The fraction of samples whose every answer greedy decoding would give exactly.

    model: fused or not; run in eval mode and put back. Answers may be any text. Raises ValueError for no samples.
    """
    if not samples:
        raise ValueError("evaluate_accuracy: expected at least one sample, got none")
    device = next(model.parameters()).device
    with _evaluating(model):
        num_right = sum(
            _num_right(model, collator(samples[start : start + batch_size]), device)
            for start in range(0, len(samples), batch_size)
        )
    return num_right / len(samples)


@torch.no_grad()  # a model in parts gathers them into tensors that training uses again: not in inference mode
def generate_answers(
    model: nn.Module, collator: Collator, samples: Sequence[Sample], *, batch_size: int = 32, max_new_tokens: int = 64
) -> list[str]:
    """The model's own answer to each sample's first question: greedy decoding with a KV cache, in batches.

    model: fused or not; run in eval mode and put back. Samples of one image whose prompts begin alike, as far as the
    image at least, share one prefill of that, where the model allows it. Returns texts without special tokens and outer
    spaces.
    """
    parameter, answers = next(model.parameters()), [""] * len(samples)
    shares = _can_share(model)
    order = _by_image(samples) if shares else list(range(len(samples)))
    with _evaluating(model):
        for start in range(0, len(samples), batch_size):
            places = order[start : start + batch_size]
            chosen = [samples[place] for place in places]
            prompts = collator.encode_prompts(chosen)
            prompts = {
                name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
                for name, value in prompts.items()
            }
            if shares:
                prompts = _with_context(model, collator, chosen, prompts)
            tokens = model.generate(
                **prompts,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=collator.pad_token_id,
            )
            told = collator.tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
            for place, text in zip(places, told, strict=True):
                answers[place] = text.strip()
    return answers


def _can_share(model: nn.Module) -> bool:
    """Whether keys and values of a prompt's beginning are all that its continuation needs of it."""
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return False  # HF PEFT makes the cache itself
    base = base_model(model)
    family = family_of(base)
    return family.why_not_packed is None and family.full_attention(base) and bool(family.vision_tower)


def _by_image(samples: Sequence[Sample]) -> list[int]:
    """The samples' places with those of one image file behind one another."""
    images: dict[object, list[int]] = {}
    for place, sample in enumerate(samples):
        images.setdefault(place if sample.image is None else sample.image, []).append(place)
    return [place for places in images.values() for place in places]


def _with_context(
    model: nn.Module, collator: Collator, samples: Sequence[Sample], prompts: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Prompts [B, T] with keys and values of what they have in common with others of their image; as they are where
    that is nothing, or not all of them have an image."""
    groups: dict[object, list[int]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault(sample.image, []).append(row)
    if None in groups or len(groups) == len(samples):
        return prompts
    of_tokens = {name: prompts[name] for name in ("input_ids", "mm_token_type_ids") if name in prompts}
    of_rows = [
        {name: value[row, mask.bool()] for name, value in of_tokens.items()}
        for row, mask in enumerate(prompts["attention_mask"])
    ]
    ids = [row["input_ids"] for row in of_rows]
    shared = [0] * len(samples)
    for rows in groups.values():
        tokens = [ids[row].tolist() for row in rows]
        alike = min(num_alike(tokens), min(map(len, tokens)) - 1)
        if collator.processor.image_token_id in tokens[0][alike:]:
            return prompts
        for row in rows:
            shared[row] = alike
    firsts = [rows[0] for rows in groups.values()]
    heads = [{name: value[: shared[row]] for name, value in of_rows[row].items()} for row in firsts]
    contexts = _padded(heads, collator.pad_token_id)
    images = take_images({name: value for name, value in prompts.items() if name not in contexts}, firsts)
    cache = model(**contexts, **images, use_cache=True, logits_to_keep=1).past_key_values
    group_of = {row: group for group, rows in enumerate(groups.values()) for row in rows}
    group = torch.tensor([group_of[row] for row in range(len(samples))], device=ids[0].device)
    cache.batch_select_indices(group)
    below_head = base_model(model).base_model
    if getattr(below_head, "rope_deltas", None) is not None:  # how far a row's positions are from its tokens' number
        below_head.rope_deltas = below_head.rope_deltas[group]
    tails = [{name: value[start:] for name, value in row.items()} for row, start in zip(of_rows, shared, strict=True)]
    rest = _padded(tails, collator.pad_token_id)
    whole = {name: torch.cat((contexts[name][group], rest[name]), dim=1) for name in rest}
    return {**whole, "past_key_values": cache}


def _padded(rows: list[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of tokens, by name, with padding on the left, and their mask."""
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    return {
        name: pad_sequence(
            [row[name] for row in rows],
            batch_first=True,
            padding_side="left",
            padding_value=pad_token_id if name == "input_ids" else 0,
        )
        for name in rows[0]
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _num_right(model: nn.Module, batch: dict, device: torch.device) -> int:
    batch = {name: value for name, value in batch.items() if name not in HOST_HINTS}
    targets = batch.pop("labels")[:, 1:]  # [B, T-1], the token that follows each position
    # Logits only at positions that some sample needs: the vocabulary is large, the answers are short.
    columns = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    logits = model(**send_to_device(batch, device), logits_to_keep=columns.to(device)).logits  # [B, columns, V]
    targets = targets[:, columns].to(device)
    right = (logits.argmax(dim=-1) == targets) | (targets == IGNORE_INDEX)
    return int(right.all(dim=1).sum())
