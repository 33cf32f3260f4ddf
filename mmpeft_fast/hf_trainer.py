"""Fusing inside transformers' Trainer, and TRL's trainers, which are built on it."""

from transformers import TrainerCallback

from mmpeft_fast.peft_model import fuse, verify_fused
from mmpeft_fast.small_batches import cut_batch

__all__ = ["FuseCallback"]


class FuseCallback(TrainerCallback):
    """`Trainer(..., callbacks=[FuseCallback()])` fuses the trainer's model (a `PeftModel` where the trainer makes one)
    once it lies on its device and before it is wrapped for distributed training or mixed precision.

    Args: those of `fuse`. verify: before the first training step a few tokens of its batch are compared with the
    unfused model (`peft_model.verify_fused`); under torch.compile tokens are made and compared before training.
    """

    def __init__(
        self,
        *,
        keep_logits: bool = False,
        strict: bool = False,
        verify: bool = True,
        cuda_graphs: bool = False,
        recompute: str | None = None,
        share_contexts: bool = False,
    ):
        self.options = {
            "keep_logits": keep_logits, "strict": strict, "cuda_graphs": cuda_graphs, "recompute": recompute,
            "share_contexts": share_contexts,
        }  # fmt: skip
        self.verify = verify

    def on_init_end(self, args, state, control, *, model, **kwargs) -> None:
        fuse(model, **self.options, verify=self.verify and args.torch_compile)

    def on_train_begin(self, args, state, control, *, model, **kwargs) -> None:
        if self.verify and not args.torch_compile:
            self.verify = False

            def verify_once(model, args, batch):
                if model.training:
                    handle.remove()
                    verify_fused(model, cut_batch(batch), strict=self.options["strict"])

            handle = model.register_forward_pre_hook(verify_once, with_kwargs=True)
