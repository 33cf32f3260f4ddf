"""Exact-match accuracy by teacher forcing.

A sample is right if, fed with the true answer, the model's most likely token is the true one at every answer position,
end token included. That is so exactly when greedy generation writes that answer and stops, so one forward replaces a
generation loop.
"""

from collections.abc import Sequence

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
    was_training = model.training
    model.eval()
    try:
        num_right = sum(
            _num_right(model, collator(samples[start : start + batch_size]), device)
            for start in range(0, len(samples), batch_size)
        )
    finally:
        model.train(was_training)
    return num_right / len(samples)


def _num_right(model: nn.Module, batch: dict, device: torch.device) -> int:
    batch = {name: value for name, value in batch.items() if name not in HOST_HINTS}
    targets = batch.pop("labels")[:, 1:]  # [B, T-1], the token that follows each position
    # Logits only at positions that some sample needs: the vocabulary is large, the answers are short.
    columns = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    logits = model(**send_to_device(batch, device), logits_to_keep=columns.to(device)).logits  # [B, columns, V]
    targets = targets[:, columns].to(device)
    right = (logits.argmax(dim=-1) == targets) | (targets == IGNORE_INDEX)
    return int(right.all(dim=1).sum())
