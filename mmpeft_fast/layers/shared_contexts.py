"""Rows that begin alike go through the decoder as one row of documents, whoever calls it and whatever reads its output.

A preference loss, a group of completions or a trainer with a head of its own calls the model below the head with rows
[B, T] and reads hidden states [B, T, H]. Both stay; between them the rows are a tree (`contexts.py`).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_fast.contexts import SharedRows, shared_rows
from mmpeft_fast.layers.class_swap import Swapped, is_swapped
from mmpeft_fast.layers.decoder_paths import DecoderPaths
from mmpeft_fast.layers.reading import is_fused
from mmpeft_fast.layers.sites import has_hooks

# Tensors of images, the first dimension an image.
_OF_IMAGES = ("pixel_values", "image_sizes")


class SharedContexts(Swapped):
    """Mixin for the model below the head (`LlamaModel`, `LlavaModel`): a call without a cache, with token ids and a
    padding mask or none, runs each beginning that rows share once. Any other call runs as it did.

    The output's `last_hidden_state` is [B, T, H] as ever, zeros at padding. With dropout, rows that share tokens share
    these tokens' masks. On an accelerator each call waits for a host copy of its ids.
    """

    paths = DecoderPaths()
    decoder_path = ""
    image_token: int | None = None

    def forward(self, *args, **kwargs):
        if "shared_rows" in kwargs:  # the caller has asked `rows_to_share` already
            shared = kwargs.pop("shared_rows")
        else:
            shared = None if args else self.rows_to_share(kwargs)
        if shared is None:
            return super().forward(*args, **kwargs)
        images = {name: kwargs[name][list(shared.images)] for name in _OF_IMAGES if kwargs.get(name) is not None}
        # Of four dimensions, so that no mask is made of it; the layers do not read it.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=shared.input_ids.device)
        outputs = super().forward(**{**kwargs, **images, **shared.batch, "attention_mask": mask})
        outputs.last_hidden_state = shared.spread(outputs.last_hidden_state)
        return outputs

    def rows_to_share(self, kwargs: Mapping[str, Any]) -> SharedRows | None:
        """The tree of a call's rows, or None: nothing is shared, or the call asks for what a tree does not give."""
        found = self._why_not(kwargs)
        if found is None:
            ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
            pixels = kwargs.get("pixel_values")
            images = [] if pixels is None else _numbers([kwargs[name] for name in _OF_IMAGES if name in kwargs])
            found = shared_rows(ids, mask, image_token=self.image_token, images=images) or "no rows begin alike"
        counts = self.__dict__.setdefault("context_calls", Counter())
        counts["shared" if isinstance(found, SharedRows) else found] += 1
        return found if isinstance(found, SharedRows) else None

    def _why_not(self, kwargs: Mapping[str, Any]) -> str | None:
        given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if torch.compiler.is_compiling():
            return "under torch.compile"
        if kwargs.get("use_cache") is not False or "past_key_values" in given:
            return "with a cache of keys and values (expected use_cache=False)"
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_meta:
            return "without token ids of rows"
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
            return "with a mask that is not one of padding"
        if given.get("return_dict", True) is not True or {"output_hidden_states", "output_attentions"} & set(given):
            return "asked for more than the last hidden states"
        known = {"input_ids", "attention_mask", *_OF_IMAGES}
        others = [name for name, value in given.items() if isinstance(value, Tensor) and name not in known]
        others += [name for name in ("documents", "supervised_rows", "ignore_padding", "prefix") if name in given]
        if others:
            return f"with {others[0]}"
        if self.image_token is not None:
            pixels, rows = given.get("pixel_values"), int((ids == self.image_token).any(dim=1).sum())
            if rows != (0 if pixels is None else len(pixels)):
                return "with several images a row"
        layers = self.paths.layers_of(self.get_submodule(self.decoder_path))
        has_prefix = any(hasattr(self.paths.attention_of(layer), "prefix") for layer in layers)
        if has_prefix and mask is not None and not mask[:, 0].all():
            # Keys of a prefix are not rotated, so results depend on positions themselves, which the model counts from
            # the first column and a tree from each row's first token.
            return "with padding on the left and a trained prefix"
        if all(is_swapped(layer) and is_fused(layer, self.paths) and not has_hooks(layer) for layer in layers):
            return None
        return "with a layer that is not fused"


def _numbers(of_images: list[Tensor]) -> list[int]:
    """For each image, the first that is equal to it."""
    found: list[int] = []
    for index in range(len(of_images[0])):
        same = (other for other in set(found) if all(torch.equal(part[other], part[index]) for part in of_images))
        found.append(next(same, index))
    return found


def context_summary(model: nn.Module) -> str | None:
    """What sharing has come to so far, in one line; None where nobody asked for it."""
    if not isinstance(model, SharedContexts):
        return None
    counts = model.__dict__.get("context_calls", Counter())
    others = "; ".join(f"{count} {reason}" for reason, count in counts.most_common() if reason != "shared")
    return f"in {counts['shared']} calls of {counts.total()}" + (f" ({others})" if others else "")
