"""What the study measures: its models, methods and implementations, and the settings that identify each cell."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from mmpeft_fast.doctor import versions
from mmpeft_fast.methods import METHODS, make_method
from mmpeft_fast.study.axes import AXES, LOCATED, LOCATIONS, SAMPLES, SEEDS, SIZES, chosen_axes, located, sized

# The tiny models of the study and the family that builds each.
TINY_MODELS = {"tiny-llava": "llava", "tiny-qwen2-vl": "qwen2_vl"}
IMPLEMENTATIONS = ("frozen", "peft", "fused")
_SCALED, _TUNED = ("lora", "ia3"), ("lora", "adapter", "ia3", "prefix")
DTYPES = ("fp32", "bf16")
DEVICES = ("cpu", "cuda")
NO_METHOD = "none"  # the method of a frozen cell
MAJORITY = "majority"  # no model: the commonest answer
EASY_VQA = "easy-vqa"


# What both papers compare; the methods around them run where they are named.
OF_THE_PAPERS = ("lora", "ia3", "adapter", "prefix", "layernorm", "layernorm-simp")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One run of the study, as the command line asks for it. Raises ValueError for anything it cannot mean.

    base: a real checkpoint by path or name, in place of the tiny models. data, images: conversations in LLaVA's JSON
    and their image folder, in place of easy-vqa; eval_samples of them are held out. axes: of `AXES`, which easy-vqa and
    the tiny models have, each as AXIS or AXIS=VALUE,VALUE. pretrain_steps: training of the tiny models' decoders before
    the cells start from them.
    """

    output: Path
    models: tuple[str, ...] = tuple(TINY_MODELS)
    methods: tuple[str, ...] = OF_THE_PAPERS
    implementations: tuple[str, ...] = IMPLEMENTATIONS
    axes: tuple[str, ...] = tuple(AXES)
    steps: int = 20
    batch_size: int = 8
    eval_samples: int = 200
    pretrain_steps: int = 100
    seed: int = 42
    threads: int = 1
    device: str = "cpu"
    dtype: str = "fp32"
    base: str | None = None
    data: Path | None = None
    images: Path | None = None
    redo: bool = False

    def __post_init__(self) -> None:
        _require_known("model", self.models, TINY_MODELS)
        _require_known("method", self.methods, METHODS)
        _require_known("implementation", self.implementations, IMPLEMENTATIONS)
        chosen_axes(self.axes)
        _require_known("dtype", (self.dtype,), DTYPES)
        _require_known("device", (self.device,), DEVICES)
        # Two steps at least: the first is a warm-up and is not timed.
        for name, smallest in {
            "steps": 2,
            "batch_size": 1,
            "eval_samples": 1,
            "pretrain_steps": 0,
            "threads": 1,
        }.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: expected 0 to {2**31 - 1}, got {self.seed}")
        if (self.data is None) != (self.images is None):
            given = "data" if self.images is None else "images"
            raise ValueError(f"expected --data and --images together, got only --{given}")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output: expected a folder, but {self.output} is a file")


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """A base model that the study trains itself, from random weights, before its cells start from it.

    tower_epochs: of tower and connector on captions; pretrain_steps: of the decoder.
    """

    model: str
    data: str
    pretrain_steps: int
    seed: int
    tower_epochs: int = 10

    @property
    def key(self) -> str:
        """Identifies this base, the package's sources and its packages' versions: 12 hexadecimal digits."""
        return spec_key(asdict(self))


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """One cell: everything that could change one of its numbers.

    axis, value: what sets it apart from the method's own cell, of `AXES`; both empty for that. task: of easy-vqa, a
    name in `inputs.TASKS`. train_samples: fewer of the training set, None: all. timed: beside the frozen step, and
    memory is measured too.
    base: the key of a tiny model's `BaseSpec`, or a real checkpoint's path or name. data: "easy-vqa", or the digest of
    the user's file.
    """

    model: str
    method: str
    implementation: str
    axis: str = ""
    value: str = ""
    task: str = ""
    train_connector: bool = False
    train_samples: int | None = None
    timed: bool = True
    overrides: dict
    learning_rate: float
    base: str
    data: str
    steps: int
    batch_size: int
    eval_samples: int
    seed: int
    threads: int
    device: str
    dtype: str

    @property
    def name(self) -> str:
        """`tiny-llava lora fused`, as the progress bar and the log files call it."""
        return cell_name(asdict(self))

    @property
    def key(self) -> str:
        """Identifies this cell, the package's sources and its packages' versions: 12 hexadecimal digits."""
        return spec_key(asdict(self))


def cell_name(cell: dict) -> str:
    """A cell's or a row's name: `tiny-llava lora fused location mlp`; a recipe's row has a name of its own."""
    if "recipe" in cell:
        return f"{cell['recipe']}: {cell['cell']}"
    words = (cell["model"], cell["method"], cell["implementation"], cell.get("axis", ""), cell.get("value", ""))
    return " ".join(word for word in words if word not in ("", NO_METHOD))


def plan(config: StudyConfig) -> tuple[list[BaseSpec], list[CellSpec]]:
    """The bases and cells of a run, in the order they run: per model the frozen cell, then method by method, then what
    is varied on the first of the tiny models."""
    data = EASY_VQA if config.data is None else hashlib.sha256(config.data.read_bytes()).hexdigest()[:12]
    bases, cells = [], []
    for model in (config.base,) if config.base else config.models:
        base = config.base
        if base is None:
            bases.append(BaseSpec(model=model, data=data, pretrain_steps=config.pretrain_steps, seed=config.seed))
            base = bases[-1].key
        task = "unseen" if data == EASY_VQA else ""
        for method, implementation in _pairs(config):
            cells.append(_cell(config, model, method, implementation, base=base, data=data, task=task))
        if data == EASY_VQA and model == next(iter(TINY_MODELS)):
            cells += _varied(config, model, base)
    return bases, cells


def _cell(config: StudyConfig, model: str, method: str, implementation: str, **fields) -> CellSpec:
    """A cell with the method's settings for small models, but for `fields`; `overrides` are added to them."""
    overrides, learning_rate = {}, 0.0
    if method != NO_METHOD:
        overrides = dict(METHODS[method]().small_settings) | fields.pop("overrides", {})
        learning_rate = make_method(method, **overrides).small_learning_rate
    usual = ("steps", "batch_size", "eval_samples", "seed", "threads", "device", "dtype")
    return CellSpec(
        model=model,
        method=method,
        implementation=implementation,
        overrides=overrides,
        learning_rate=learning_rate,
        **{name: getattr(config, name) for name in usual} | fields,
    )


def _varied(config: StudyConfig, model: str, base: str) -> list[CellSpec]:
    """The cells along `AXES` of the configuration's methods, fused; what is no model's work among them. Not the values
    that every method's own cell has."""
    cells, axes = [], chosen_axes(config.axes)

    def add(axis: str, value: str, method: str, implementation: str = "fused", **fields) -> None:
        if value in axes.get(axis, ()) and implementation in (*config.implementations, MAJORITY):
            fields = {"axis": axis, "value": value, "task": "unseen", "timed": False} | fields
            cells.append(_cell(config, model, method, implementation, base=base, data=EASY_VQA, **fields))

    def chosen(methods: tuple[str, ...]) -> list[str]:
        return [method for method in methods if method in config.methods]

    if "frozen" in config.implementations:
        for task in ("unseen", "seen"):
            add("task", task, NO_METHOD, MAJORITY, task=task)
    add("task", "seen", NO_METHOD, "frozen", task="seen")
    for method in config.methods:
        add("task", "seen", method, task="seen")
    for method in chosen(LOCATED):
        for place in LOCATIONS:
            add("location", place, method, overrides=located(place))
    for method in chosen(tuple(SIZES)):
        setting, values = SIZES[method]
        for value in values:
            add("size", f"{setting}={value}", method, overrides=sized(method, setting, value))
    for method in chosen(_TUNED):
        add("connector", "tuned", method, train_connector=True)
    for method in chosen(_SCALED):
        for number in SAMPLES:
            add("samples", str(number), method, train_samples=number)
    for method in chosen(_TUNED):
        for seed in SEEDS:
            if seed != config.seed:
                add("seed", str(seed), method, seed=seed)
    return cells


def _pairs(config: StudyConfig) -> list[tuple[str, str]]:
    pairs = [(NO_METHOD, "frozen")] if "frozen" in config.implementations else []
    trained = [name for name in IMPLEMENTATIONS if name != "frozen" and name in config.implementations]
    return pairs + [(method, implementation) for method in config.methods for implementation in trained]


def _require_known(what: str, names: tuple[str, ...], known) -> None:
    if not names:
        raise ValueError(f"{what}: expected at least one of {', '.join(known)}, got none")
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: expected one of {', '.join(known)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{what}: expected each name once, got {', '.join(names)}")


def spec_key(spec: dict) -> str:
    """Identifies a specification, the package's sources and its packages' versions: 12 hexadecimal digits."""
    text = json.dumps([spec, versions(), _sources_digest()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def _sources_digest() -> str:
    """Digest of the sources a number can depend on, so that a row is never reused for code that has changed since."""
    package = Path(__file__).parents[1]
    shown_only = {"cli.py", "doctor.py", "__main__.py"} | {
        f"study/{name}.py"
        for name in (
            *("command", "run", "progress", "table", "report", "charts", "varied", "data_check", "status", "diff"),
            *("rows", "process", "in_turn", "on_ray", "ledger"),
            *("recipes/command", "recipes/cost", "recipes/run", "recipes/table", "recipes/page"),
        )
    }
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name not in shown_only and not name.startswith("pages/"):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
