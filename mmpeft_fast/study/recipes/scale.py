"""The two sizes that every recipe comes in: the papers' own, and a small one on models that are built on the spot."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mmpeft_fast.methods import METHODS, make_method
from mmpeft_fast.study.recipes.recipe import Data, RecipeCell

STUDY_METHODS = ("adapter", "lora", "ia3", "prefix")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is tuned on and what is tested, of one data set."""

    train: Data
    test: Data

    @property
    def name(self) -> str:
        return self.train.name


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A size of the experiments.

    models: of the comparison of models; model: where there is one; large_model: the LayerNorm paper's other size.
    unseen, seen: tasks that the bases were not and were trained on. sizes: of each method, the setting and its values,
    ascending. counts: training samples of the data scale. epochs: usual, and of the long runs, which are tested four
    times. captions: what hallucination is counted on. yes_no: questions about objects. dialogues, everything: of the
    LayerNorm paper's training data. training: fields of `TrainConfig`. steps: of a run that is timed. batches, lengths,
    dtypes: what time is measured over.
    """

    name: str
    models: tuple[str, ...]
    model: str
    large_model: str
    profile_model: str
    unseen: tuple[Task, ...]
    seen: tuple[Task, ...]
    sizes: Mapping[str, tuple[str, tuple[int, ...]]]
    counts: tuple[int, ...]
    epochs: int
    long_epochs: int
    captions: Data
    captions_after: Task
    yes_no: Data
    dialogues: Data
    everything: Data
    many_questions: Data
    layernorm_tests: tuple[Data, ...]
    layernorm_rank: int
    training: Mapping[str, object]
    steps: int
    batches: tuple[int, ...]
    batch: int
    lengths: tuple[int, ...]
    dtypes: tuple[str, ...]
    uses_small_settings: bool

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.unseen + self.seen

    def cell(self, model: str, method: str, **fields) -> RecipeCell:
        """A cell with this size's settings for the method, its learning rates and its training; `fields` win, and
        `settings` and `training` are added to."""
        settings, training = dict(fields.pop("settings", {})), dict(fields.pop("training", {}))
        if self.uses_small_settings and method != "none":
            settings = dict(METHODS[method]().small_settings) | settings
            rate = make_method(method, **settings).small_learning_rate
            training = {"learning_rate": rate, "connector_learning_rate": rate / 10} | training
        training = {"epochs": self.epochs, **self.training, **training}
        fields = {"dtype": self.dtypes[0], "labels": {}} | fields
        return RecipeCell(model=model, method=method, settings=settings, training=training, **fields)


def _task(name: str, train_size: int, test_split: str, test_size: int, *, limited: bool = False) -> Task:
    """limited: the study takes a random part of so many samples, else the whole split."""
    kind = "limit" if limited else "size"
    return Task(
        train=Data(name=name, split="train", **{kind: train_size}),
        test=Data(name=name, split=test_split, **{kind: test_size}),
    )


_SCIENCE_QA = _task("scienceqa", 13_000, "test", 4_000)
_VIZWIZ = _task("vizwiz", 20_000, "val", 4_000)
_ICONQA_TXT = _task("iconqa-txt", 19_000, "test", 6_000)
_ICONQA_BLANK = _task("iconqa-blank", 11_000, "test", 4_000)
_FLICKR30K = _task("flickr30k", 31_000, "test", 1_000)
_VQAV2 = _task("vqav2", 20_000, "val", 5_000, limited=True)
_OCRVQA = _task("ocrvqa", 20_000, "test", 5_000, limited=True)

FULL = Scale(
    name="full",
    models=("llava-1.5-7b", "llava-1.5-13b", "sharegpt4v-7b", "qwen-vl-chat"),
    model="llava-1.5-7b",
    large_model="llava-1.5-13b",
    profile_model="qwen-vl-chat",
    unseen=(_SCIENCE_QA, _VIZWIZ, _ICONQA_TXT, _ICONQA_BLANK, _FLICKR30K),
    seen=(_task("okvqa", 9_000, "val", 5_000), _OCRVQA, _VQAV2),
    sizes={
        "lora": ("r", (16, 32, 64, 128)),
        "adapter": ("bottleneck", (32, 64, 128, 256)),
        "prefix": ("num_virtual_tokens", (10, 20, 30, 40)),
    },
    counts=(1_000, 5_000, 10_000),
    epochs=3,
    long_epochs=12,
    captions=Data(name="flickr30k", split="test", limit=100, metric="hallucination"),
    captions_after=_ICONQA_TXT,
    yes_no=Data(name="pope", split="adversarial", size=3_000),
    dialogues=Data(name="llava", split="conversation58k", size=58_000),
    everything=Data(name="llava", split="instruct150k", size=158_000),
    many_questions=Data(name="ocrvqa", split="train", limit=1_000),
    layernorm_tests=(_VQAV2.test, _FLICKR30K.test, Data(name="pope", split="adversarial", size=3_000)),
    layernorm_rank=64,
    training={"global_batch_size": 128, "batch_size": 16, "gradient_checkpointing": True},
    steps=12,
    batches=(1, 4, 16),
    batch=4,
    lengths=(384, 512, 1024, 2048),
    dtypes=("bf16", "fp32"),
    uses_small_settings=False,
)


def _easy(kind: str) -> Task:
    name = f"easy-vqa{kind}"
    return Task(train=Data(name=name, split="train", limit=96), test=Data(name=name, split="test", limit=64))


SMALL = Scale(
    name="small",
    models=("tiny-llava", "tiny-qwen2-vl"),
    model="tiny-llava",
    large_model="tiny-qwen2-vl",
    profile_model="tiny-qwen2-vl",
    unseen=(_easy("-color"),),
    seen=(_easy("-shape"),),
    sizes={
        "lora": ("r", (2, 4, 8, 16)),
        "adapter": ("bottleneck", (2, 4, 8, 16)),
        "prefix": ("num_virtual_tokens", (5, 10, 20, 40)),
    },
    counts=(24, 96, 384),
    epochs=3,
    long_epochs=4,
    captions=replace(_easy("-caption").test, metric="shape_hallucination"),
    captions_after=_easy("-shape"),
    yes_no=_easy("-yes-no").test,
    dialogues=_easy("-yes-no").train,
    everything=_easy("").train,
    many_questions=Data(name="easy-vqa", split="train", limit=160),
    layernorm_tests=(_easy("").test, _easy("-yes-no").test),
    layernorm_rank=8,
    training={"global_batch_size": 8, "batch_size": 8},
    steps=12,
    batches=(1, 4, 8),
    batch=4,
    lengths=(128, 256),
    dtypes=("fp32", "bf16"),
    uses_small_settings=True,
)
SCALES = {scale.name: scale for scale in (FULL, SMALL)}
