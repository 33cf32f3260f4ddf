"""What a recipe is: cells to run, what their table compares, and the published numbers beside it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from mmpeft_fast.study.cells import spec_key


@dataclass(frozen=True, kw_only=True)
class Data:
    """A split of a data set, or a random part of it. size: of the whole split as its publisher or the study counts it,
    for the cost alone. metric: another one than the set's own."""

    name: str
    split: str
    limit: int | None = None
    size: int | None = None
    metric: str | None = None

    @property
    def num_samples(self) -> int:
        return self.limit or self.size or 0


@dataclass(frozen=True, kw_only=True)
class RecipeCell:
    """One training and its evaluations.

    labels: what sets the cell apart in its recipe, by axis. method: a name in `METHODS`, or "none": the base alone.
    settings: of the method, where they are not the study's for the model. train: further parts of the model that are
    trained (`placement.PARTS`). training: fields of `TrainConfig` that are not the study's. evaluate_every: epochs
    between evaluations; None: after the last. length: tokens that every sample is padded to. questions_per_image: more
    than one keeps the questions of an image together, and their context there once where the model can.
    """

    model: str
    labels: Mapping[str, str]
    method: str = "none"
    settings: Mapping[str, object] = field(default_factory=dict)
    implementation: str = "fused"
    train: tuple[str, ...] = ()
    data: Data | None = None
    training: Mapping[str, object] = field(default_factory=dict)
    evaluations: tuple[Data, ...] = ()
    evaluate_every: float | None = None
    length: int | None = None
    questions_per_image: int = 1
    dtype: str = "bf16"
    seed: int = 42

    @property
    def name(self) -> str:
        """Its labels in words, unique within its recipe."""
        return " ".join(dict.fromkeys(self.labels.values()))

    @property
    def key(self) -> str:
        """Identifies this cell, the package's sources and its packages' versions: 12 hexadecimal digits."""
        return spec_key(asdict(self))

    @property
    def used_data(self) -> tuple[Data, ...]:
        return (*filter(None, (self.data,)), *self.evaluations)

    @property
    def trained_samples(self) -> int:
        """Samples that pass forward and backward in training."""
        if self.method == "none" or self.data is None:
            return 0
        if "max_steps" in self.training:
            return self.training["max_steps"] * self.training.get("global_batch_size", 128)
        return round(self.data.num_samples * self.training.get("epochs", 3))

    @property
    def evaluated_samples(self) -> int:
        times = 1 if self.evaluate_every is None else round(self.training.get("epochs", 3) / self.evaluate_every)
        return times * sum(each.num_samples for each in self.evaluations)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published number: the rows of the table that it belongs to (their labels), what it is, where it stands, and
    which of ours it is held against (`table.MEASURES`)."""

    labels: Mapping[str, str]
    quantity: str
    measure: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An experiment. source: the paper's. rows: the axes that tell the table's rows apart; over the others, means are
    taken. scored: the metric that makes up the table's score, None: the mean over all. over_epochs: the score
    is the mean over the epochs after which there was a test, else that after the last. notes: what is not as in the
    paper, or not known of it.
    """

    name: str
    title: str
    source: str
    rows: tuple[str, ...]
    cells: tuple[RecipeCell, ...]
    published: tuple[Published, ...] = ()
    scored: str | None = None
    over_epochs: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [cell.name for cell in self.cells]
        assert len(set(names)) == len(names), f"{self.name}: two cells of one name"
        for cell in self.cells:
            assert set(self.rows) <= set(cell.labels), f"{self.name}: {cell.name} lacks an axis of the rows"
