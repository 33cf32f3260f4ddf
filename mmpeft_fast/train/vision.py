"""A frozen vision tower's features once an image: computed by the model, kept by a `FeatureStore`, used in its place.

An image's features depend on nothing but its pixels where tower and connector are frozen. They are computed for each
image alone, so that they have the same bits whatever else was in the batch that met it first.
"""

import hashlib
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mmpeft_fast.data import FEATURES, FeatureStore
from mmpeft_fast.data.feature_store import DEFAULT_MOST_BYTES
from mmpeft_fast.models import base_model, family_of
from mmpeft_fast.train.identity import modules_digest, weights_digest

_POOLED, _DEEP, _JOINT = "features", "deepstack_features", ".joint"


def cache_vision(model: nn.Module, folder: str | Path, *, most_bytes: int = DEFAULT_MOST_BYTES) -> FeatureStore:
    """Make a model take images' features from a folder, where a collator has found them, and put the others there.

    The store belongs into the collator: `Collator(processor, features=cache_vision(model, folder))`, also inside
    transformers' Trainer and TRL's. Call it for the model as it will be called (a `PeftModel`, not what it wraps), on
    its device, with its weights, and with what is trained marked as such. Features are computed in the weights' own
    dtype, also under autocast.

    Raises:
        ValueError: why this model's features cannot be kept (`why_no_vision_cache`), or why the folder cannot.
    """
    reason = why_no_vision_cache(model)
    if reason is not None:
        raise ValueError(f"vision cache: expected a model whose image features stay what they are, but {reason}")
    store = FeatureStore(folder, _revision(model), most_bytes=most_bytes)
    multimodal = base_model(model).base_model
    if not isinstance(multimodal.__dict__.get("get_image_features"), _KeptFeatures):
        multimodal.get_image_features = _KeptFeatures(multimodal)
    kept = multimodal.get_image_features
    model.register_forward_pre_hook(
        lambda module, args, batch: (args, kept.in_place_of_images(batch, store)), with_kwargs=True
    )
    return store


def why_no_vision_cache(model: nn.Module) -> str | None:
    """Why the features of an image may differ from step to step, or cannot be given to the model; None: they do not."""
    family, base = family_of(model), base_model(model)
    if family.why_no_vision_cache is not None:
        return family.why_no_vision_cache
    if not family.vision_tower:
        return "it reads text alone"
    if not family.image_features:
        return f"family {family.name!r} does not say what makes them"
    for path in family.image_features:
        part = attrgetter(path)(base)
        parameters = [("", part)] if isinstance(part, nn.Parameter) else part.named_parameters()
        for name, parameter in parameters:
            if parameter.requires_grad:
                return f"{'.'.join(filter(None, (path, name)))} is trained"
        for name, module in part.named_modules() if isinstance(part, nn.Module) else ():
            rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
            if isinstance(rate, float) and rate > 0:
                return f"{path}.{name} drops values at random"
    return None


def _revision(model: nn.Module) -> str:
    """Digest of everything but the pixels that decides the features' bits."""
    family, base = family_of(model), base_model(model)
    words = [family.name, transformers.__version__, next(base.parameters()).device.type, repr(base.config.to_dict())]
    for path in family.image_features:
        part = attrgetter(path)(base)
        part = nn.ParameterList([part]) if isinstance(part, nn.Parameter) else part
        words += [path, weights_digest(part), modules_digest(part)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


class _KeptFeatures:
    """A multimodal model's `get_image_features`, which finds what is kept on the tensor that stands for the pixels."""

    def __init__(self, multimodal: nn.Module) -> None:
        self._compute = multimodal.get_image_features

    def __call__(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        kept = getattr(pixel_values, "kept", None)
        return self._compute(pixel_values, *args, **kwargs) if kept is None else kept

    def in_place_of_images(self, batch: Mapping[str, Any], store: FeatureStore) -> dict[str, Any]:
        """A batch with its images' features, those that were missing computed and stored."""
        batch = dict(batch)
        images = batch.pop(FEATURES, None)
        if images is None:
            return batch
        made: dict[str, dict[str, Tensor]] = {}
        found = []
        for image in images:
            key, output = image["key"], image.get("output")
            if output is None and key not in made:
                made[key] = self._features(image["inputs"])
                if key:
                    store.write(key, made[key] | image["others"])
            found.append(made.pop(key) if not key else made.get(key) if output is None else output)
        # A model asks for features where it gets pixels; of a length that is no batch's, so that nobody cuts it.
        batch["pixel_values"] = torch.empty(len(batch["input_ids"]) + 1, device=batch["input_ids"].device)
        batch["pixel_values"].kept = _as_output(found)
        return batch

    @torch.no_grad()
    def _features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of one image by the model's own code."""
        with torch.autocast(inputs["pixel_values"].device.type, enabled=False):
            output = self._compute(**inputs, return_dict=True)
        deep = getattr(output, _DEEP, None) or ()
        features = {_POOLED: output.pooler_output[0]}
        for index, each in enumerate(deep):
            # Up to transformers 5.17 one tensor for all images, later one for each.
            is_joint = isinstance(each, Tensor)
            features[f"{_DEEP}.{index}{_JOINT if is_joint else ''}"] = each if is_joint else each[0]
        return features


def _as_output(images: list[dict[str, Tensor]]) -> Any:
    """What `get_image_features` returns for images of these features."""
    output = transformers.modeling_outputs.BaseModelOutputWithPooling(
        pooler_output=[image[_POOLED] for image in images]
    )
    deep = sorted((name for name in images[0] if name.startswith(_DEEP)), key=lambda name: int(name.split(".")[1]))
    if deep:
        levels = [[image[name] for image in images] for name in deep]
        output.deepstack_features = [
            torch.cat(level) if name.endswith(_JOINT) else level for name, level in zip(deep, levels, strict=True)
        ]
    return output
