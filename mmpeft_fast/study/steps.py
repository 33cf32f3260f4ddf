"""The two steps that the study times: a training step, and the frozen model's forward + dX, the speed of light."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mmpeft_fast.data import HOST_HINTS
from mmpeft_fast.peft_model import takes_hints
from mmpeft_fast.train import build_optimizer, cosine_with_warmup

WARMUP_RATIO = 0.03  # of the learning rate's schedule, the study's


def inputs_for(model: nn.Module, batch: dict) -> dict:
    """A collated batch as the model's keyword arguments, on the model's device and, for images, in its dtype."""
    parameter = next(model.parameters())
    inputs = {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    if takes_hints(model):
        inputs |= {name: batch[name] for name in HOST_HINTS}
    return inputs


def training_steps(model: nn.Module, *, learning_rate: float, num_steps: int) -> Callable[[dict], Tensor]:
    """A function that does one training step: forward, backward, AdamW; it returns the loss [] before the update.

    model: its trainable parameters are trained. num_steps: the length of the cosine schedule. Raises ValueError where
    nothing is trainable.
    """
    optimizer = build_optimizer(model, learning_rate=learning_rate)
    scheduler = cosine_with_warmup(optimizer, steps=num_steps, warmup_ratio=WARMUP_RATIO)

    def step(inputs: dict) -> Tensor:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def frozen_step(model: nn.Module, inputs: dict) -> Tensor:
    """Forward + dX of a frozen model: no parameter gets a gradient, the input embeddings do. Returns the loss []."""
    loss = frozen_forward(model, inputs)
    loss.backward()
    return loss.detach()


def frozen_forward(model: nn.Module, inputs: dict) -> Tensor:
    """The loss [] of a frozen model, differentiable with respect to the decoder's input embeddings only."""
    with _input_gradients(model):
        return model(**inputs).loss


@contextmanager
def _input_gradients(model: nn.Module) -> Iterator[None]:
    handle = model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def frozen_twin(model: nn.Module) -> nn.Module:
    """A frozen copy of the stock model that shares the storage of its parameters, so that it costs no memory.

    model: before any method was added. Tied parameters stay tied.
    """
    # deepcopy takes an object it finds in the memo for already copied.
    memo = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in model.parameters()}
    return copy.deepcopy(model, memo)
