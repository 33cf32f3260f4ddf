"""What is planned: one training step of a model, method, implementation and batch."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Any

from torch import Tensor
from transformers import PretrainedConfig

from mmpeft_fast.documents import Documents
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.fields import Bound, between, check_fields, one_of
from mmpeft_fast.methods import make_method
from mmpeft_fast.models import FAMILIES, UNLOADABLE, check_config, empty_model, family_for
from mmpeft_fast.models.inputs import num_supervised, training_batch
from mmpeft_fast.peft_model import RECOMPUTE

IMPLEMENTATIONS = ("frozen", "peft", "fused")
TRAINABLE_PARTS = ("connector", "embeddings", "head")
OPTIMIZERS = ("foreach", "fused")
CONTEXTS = ("shared", "separate")
DENSE = "dense"
BASES = (DENSE, "nf4", "fp4", "int8")
# Token ids and masks of a planned batch are real tensors: beyond this they would not fit where the plan is made.
MOST_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True)
class Request:
    """One step to plan.

    Attributes:
        model: a size that a family offers, or a folder (or file) with a configuration that transformers can build.
        method: name in `METHODS`; settings: its settings that differ from the study's for the model.
        implementation: frozen (forward and the gradient of the input embeddings), peft (`baseline`) or fused.
        batch_size, seq_len: samples, and tokens a sample with those of its images; without padding.
        questions_per_image: where above 1, each of `batch_size` stands for so many samples on one image.
            question_tokens: then those of a sample's that are its own, behind what it has in common with the others.
        context: then the fused implementation computes what is in common once ("shared") or for each ("separate");
            the others run separate samples.
        images: images a sample; None is one, or none where the model reads text alone.
        image_size: pixels a side, where the family takes any.
        supervised_fraction: share of the tokens that carry a label.
        dtype: of the base model. base: what its linear layers' weights are stored as, "dense" or a format of
            bitsandbytes, with 8-bit scales of blocks. checkpointing: activation checkpointing of the decoder's layers.
        recompute: what fused layers make again in the backward (`fuse`), and nothing else does.
        train: parts of the base model that are trained too, of TRAINABLE_PARTS.
        fp32_adapters: added parameters are float32, else in `dtype`.
        optimizer: AdamW as torch chooses on a GPU, a pass for each operation ("foreach"), or in one ("fused").
    """

    model: str
    method: str = "lora"
    settings: Mapping[str, object] = field(default_factory=dict)
    implementation: Annotated[str, one_of(*IMPLEMENTATIONS)] = "fused"
    batch_size: Annotated[int, between(1, 2**20)] = 1
    seq_len: Annotated[int, between(2, 2**20)] = 1024
    questions_per_image: Annotated[int, between(1, 1024)] = 1
    question_tokens: Annotated[int, between(2, 2**20)] = 64
    context: Annotated[str, one_of(*CONTEXTS)] = "shared"
    images: Annotated[int, between(0, 1024)] | None = None
    image_size: Annotated[int, between(1, 2**14)] | None = None
    supervised_fraction: Annotated[float, Bound("in (0, 1]", lambda share: 0 < share <= 1)] = 0.05
    dtype: Annotated[str, one_of(*DTYPES)] = "bf16"
    base: Annotated[str, one_of(*BASES)] = DENSE
    checkpointing: bool = False
    recompute: Annotated[str | None, one_of(*RECOMPUTE)] = None
    train: tuple[str, ...] = ()
    fp32_adapters: bool = True
    optimizer: Annotated[str, one_of(*OPTIMIZERS)] = "foreach"

    def __post_init__(self):
        check_fields(self)
        if self.images is None:
            object.__setattr__(self, "images", _usual_images(self.model))
        if self.samples * self.seq_len > MOST_TOKENS:
            raise ValueError(
                f"batch_size, seq_len: expected at most {MOST_TOKENS} tokens together, "
                f"got {self.samples} samples of {self.seq_len}"
            )
        labelled = num_supervised(self.seq_len, self.supervised_fraction)
        if self.questions_per_image > 1 and not labelled < self.question_tokens < self.seq_len:
            raise ValueError(
                f"question_tokens: expected more than the {labelled} labelled ones and less than seq_len "
                f"{self.seq_len}, got {self.question_tokens}"
            )
        unknown = sorted(set(self.train) - set(TRAINABLE_PARTS))
        if unknown:
            raise ValueError(f"train: expected parts among {list(TRAINABLE_PARTS)}, got {unknown}")
        if self.base != DENSE and find_spec("bitsandbytes") is None:
            raise ValueError(f"base: expected bitsandbytes installed for {self.base!r}; pip install bitsandbytes")
        if self.recompute is not None and (self.implementation != "fused" or self.checkpointing):
            raise ValueError("recompute: expected implementation fused without checkpointing")
        make_method(self.method, **self.settings)

    @property
    def samples(self) -> int:
        return self.batch_size * self.questions_per_image

    @property
    def size(self) -> str:
        """The batch in words."""
        if self.questions_per_image == 1:
            return f"{self.batch_size} x {self.seq_len} tokens"
        common = self.seq_len - self.question_tokens
        how = "once" if self.shares else "each"
        return f"{self.batch_size} x {self.questions_per_image} x {self.seq_len} tokens, {common} in common ({how})"

    @property
    def shares(self) -> bool:
        return self.questions_per_image > 1 and self.context == "shared" and self.implementation == "fused"

    def batch(self, config: PretrainedConfig, empty: Callable[..., Tensor]) -> dict[str, Any]:
        """What the model is called with; `empty` as of `training_batch`.

        Raises:
            ValueError: the images do not fit into the length, or the family's samples cannot share a row.
        """
        labelled, common = num_supervised(self.seq_len, self.supervised_fraction), self.seq_len - self.question_tokens
        rows, length = self.samples, self.seq_len
        if self.shares:
            rows, length = self.batch_size, common + self.questions_per_image * self.question_tokens
        inputs: dict[str, Any] = training_batch(
            config, empty, batch_size=rows, seq_len=length, images=self.images, labelled=labelled,
            within=common if self.questions_per_image > 1 else self.seq_len, image_size=self.image_size,
            dtype=DTYPES[self.dtype],
        )  # fmt: skip
        if self.implementation == "fused":
            inputs |= {"supervised_capacity": labelled, "right_padded": True}
        if self.shares:
            inputs |= self._documents(config, inputs["labels"], labelled, common)
        return inputs

    def _documents(self, config: PretrainedConfig, labels: Tensor, labelled: int, common: int) -> dict[str, Any]:
        family = family_for(config.model_type, "configuration")
        if family.why_not_packed is not None:
            raise ValueError(f"context: expected separate for {self.model}: {family.why_not_packed}")
        own = ((self.question_tokens, 0),) * self.questions_per_image
        documents = Documents((((common, -1), *own),) * self.batch_size)
        labels[:, common:].unflatten(1, (-1, self.question_tokens))[..., -labelled:] = labels[0, -1]
        return {
            "documents": documents, "position_ids": documents.position_ids(),
            "supervised_capacity": labelled * self.questions_per_image,
        }  # fmt: skip

    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            ValueError: no such size, and no readable configuration of a known family there.
        """
        return model_config(self.model)


def _usual_images(model: str) -> int:
    try:
        model_type = model_config(model).model_type
    except ValueError:
        return 1  # what is wrong with the model is said where it is read
    return next(family.usual_images for family in FAMILIES.values() if model_type in family.model_types)


def model_config(model: str) -> PretrainedConfig:
    """The configuration of a size by name, or of a local folder or file."""
    sizes = {size: build for family in FAMILIES.values() for size, build in family.sizes.items()}
    if model in sizes:
        return sizes[model]()
    if not os.path.exists(model):
        raise ValueError(f"model: expected one of {sorted(sizes)} or a local configuration, got {model!r}")
    try:
        model_type = PretrainedConfig.get_config_dict(model, local_files_only=True)[0].get("model_type")
        for family in FAMILIES.values():
            if model_type in family.model_types:
                config = family.model_class.config_class.from_pretrained(model, local_files_only=True)
                check_config(config)
                family.layers_of(empty_model(config))  # what only building it would tell
                return config
    except UNLOADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"model: transformers cannot build the configuration in {model!r}: {reason}") from error
    known = sorted(name for family in FAMILIES.values() for name in family.model_types)
    raise ValueError(f"model: expected a configuration of type {known}, got {model_type!r} in {model!r}")
