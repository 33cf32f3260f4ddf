"""Fusing inside transformers' Trainer, and TRL's trainers, which are built on it."""

from transformers import TrainerCallback

from mmpeft_fast.peft_model import fuse

__all__ = ["FuseCallback"]


class FuseCallback(TrainerCallback):
    """`Trainer(..., callbacks=[FuseCallback()])` fuses the trainer's model (a `PeftModel` where the trainer makes one)
    once it lies on its device and before it is wrapped for distributed training or mixed precision.

    Args: those of `fuse`.
    """

    def __init__(self, *, keep_logits: bool = False, strict: bool = False):
        self.options = {"keep_logits": keep_logits, "strict": strict}

    def on_init_end(self, args, state, control, *, model, **kwargs) -> None:
        fuse(model, **self.options)
