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

from mmpeft_fast.data import HOST_HINTS, IGNORE_INDEX, Collator, Sample


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


@torch.inference_mode()
def generate_answers(
    model: nn.Module, collator: Collator, samples: Sequence[Sample], *, batch_size: int = 32, max_new_tokens: int = 64
) -> list[str]:
    """The model's own answer to each sample's first question: greedy decoding with a KV cache, in batches.

    model: fused or not; run in eval mode and put back. Returns texts without special tokens and outer spaces.
    """
    parameter, answers = next(model.parameters()), []
    with _evaluating(model):
        for start in range(0, len(samples), batch_size):
            prompts = collator.encode_prompts(samples[start : start + batch_size])
            prompts = {
                name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
                for name, value in prompts.items()
            }
            tokens = model.generate(
                **prompts,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=collator.pad_token_id,
            )
            told = collator.tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
            answers += [text.strip() for text in told]
    return answers


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
