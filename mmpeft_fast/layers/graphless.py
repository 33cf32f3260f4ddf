"""Frozen parts before the decoder run without a graph."""

import torch

from mmpeft_fast.layers.class_swap import Swapped


class Graphless(Swapped):
    """Mixin for frozen parts before the decoder (vision tower): no autograd graph while nothing in them is trained,
    even where an input was made to require grad."""

    def _is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def gradient_checkpointing(self) -> bool:
        """What transformers' switch says, but never while frozen: there is nothing to keep, so nothing to recompute."""
        return self.__dict__.get("gradient_checkpointing", False) and self._is_trained()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.__dict__["gradient_checkpointing"] = value

    def forward(self, *args, **kwargs):
        if self._is_trained():
            return super().forward(*args, **kwargs)
        with torch.no_grad():
            return super().forward(*args, **kwargs)
