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
from mmpeft_fast.patch_grids import mrope_positions, split_images, take_images

_OF_IMAGES = ("pixel_values", "image_sizes", "image_grid_thw")
_TOKEN_TYPES = "mm_token_type_ids"  # which tokens are an image's, as positions are read from; see `_own_positions`


class SharedContexts(Swapped):
    """Mixin for the model below the head (`LlamaModel`, `LlavaModel`): a call without a cache, with token ids and a
    padding mask or none, runs each beginning that rows share once. Any other call runs as it did.

    The output's `last_hidden_state` is [B, T, H] as ever, zeros at padding. With dropout, rows that share tokens share
    these tokens' masks. On an accelerator each call waits for a host copy of its ids.
    """

    paths = DecoderPaths()
    decoder_path = ""
    image_token: int | None = None
    merge_size: int | None = None  # of images that are grids of patches, whose tokens have three positions each

    def forward(self, *args, **kwargs):
        if "shared_rows" in kwargs:  # the caller has asked `rows_to_share` already
            shared = kwargs.pop("shared_rows")
        else:
            shared = None if args else self.rows_to_share(kwargs)
        if shared is None:
            return super().forward(*args, **kwargs)
        changed = take_images(_images_of(kwargs), shared.images)
        if kwargs.get("image_grid_thw") is not None:
            changed["position_ids"] = shared.gathered(self._own_positions(kwargs))
        kwargs = {name: value for name, value in kwargs.items() if name != _TOKEN_TYPES}
        # Of four dimensions, so that no mask is made of it; the layers do not read it.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=shared.input_ids.device)
        outputs = super().forward(**{**kwargs, **shared.batch, **changed, "attention_mask": mask})
        outputs.last_hidden_state = shared.spread(outputs.last_hidden_state)
        return outputs

    def _own_positions(self, kwargs: Mapping[str, Any]) -> Tensor:
        """[3, B, T] of the tokens of rows, 0 for padding."""
        ids, mask, grids = kwargs["input_ids"], kwargs.get("attention_mask"), kwargs["image_grid_thw"]
        found = ids.new_zeros((3, *ids.shape))
        remaining = iter(grids.tolist())
        for row in range(len(ids)):
            real = slice(None) if mask is None else mask[row].bool()
            is_image = ids[row, real] == self.image_token
            own = [next(remaining)] if is_image.any() else []
            found[:, row, real] = mrope_positions(is_image, own, self.merge_size).to(found)
        return found

    def rows_to_share(self, kwargs: Mapping[str, Any]) -> SharedRows | None:
        """The tree of a call's rows, or None: nothing is shared, or the call asks for what a tree does not give."""
        found = self._why_not(kwargs)
        if found is None:
            ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
            numbers = _numbers(_images_of(kwargs))
            found = shared_rows(ids, mask, image_token=self.image_token, images=numbers) or "no rows begin alike"
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
        known = {"input_ids", "attention_mask", _TOKEN_TYPES, *_OF_IMAGES}
        others = [name for name, value in given.items() if isinstance(value, Tensor) and name not in known]
        others += [name for name in ("documents", "supervised_rows", "ignore_padding", "prefix") if name in given]
        if others:
            return f"with {others[0]}"
        if self.image_token is not None:
            entries = given.get("image_grid_thw", given.get("pixel_values", ()))
            if int((ids == self.image_token).any(dim=1).sum()) != len(entries):
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


def _images_of(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: kwargs[name] for name in _OF_IMAGES if kwargs.get(name) is not None}


def _numbers(inputs: Mapping[str, Tensor]) -> list[int]:
    """For each image, the first that is equal to it."""
    found: list[int] = []
    images = list(zip(*split_images(inputs).values(), strict=True))
    for index, image in enumerate(images):
        same = (other for other in set(found) if all(map(torch.equal, images[other], image)))
        found.append(next(same, index))
    return found


def context_summary(model: nn.Module) -> str | None:
    """What sharing has come to so far, in one line; None where nobody asked for it."""
    if not isinstance(model, SharedContexts):
        return None
    counts = model.__dict__.get("context_calls", Counter())
    others = "; ".join(f"{count} {reason}" for reason, count in counts.most_common() if reason != "shared")
    return f"in {counts['shared']} calls of {counts.total()}" + (f" ({others})" if others else "")
