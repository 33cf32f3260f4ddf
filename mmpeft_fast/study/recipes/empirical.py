"""The experiments of "An Empirical Study on PEFT for MultiModal LLMs" (arXiv 2406.05130), a function each."""

from dataclasses import replace

from mmpeft_fast.plan.papers import STUDY_PERCENT
from mmpeft_fast.study.axes import LOCATED, LOCATIONS, SEEDS, located, sized
from mmpeft_fast.study.recipes.recipe import Published, Recipe, RecipeCell
from mmpeft_fast.study.recipes.scale import STUDY_METHODS, Scale, Task

PAPER = "arXiv 2406.05130"
_LLAVA_7B = "llava-1.5-7b"
# Mean of eight tasks on LLaVA-1.5-7B, in percent: connector frozen, tuned.
_MEAN_SCORE = {
    "adapter": ("74.6", "76.3"),
    "lora": ("76.1", "76.7"),
    "ia3": ("63.1", "76.3"),
    "prefix": ("68.1", "69.6"),
}
# Score at each location on LLaVA-1.5-7B, in percent: attention, MLP, both.
_LOCATION_SCORE = {
    "adapter": ("74.1", "74.3", "73.2"),
    "lora": ("75.1", "75.2", "75.5"),
    "ia3": ("73.8", "74.1", "74.1"),
}
# Millions of trained parameters on LLaVA-1.5-7B, sizes ascending.
_SIZE_MILLIONS = {
    "lora": ("40.0", "80.0", "159.9", "319.8"),
    "adapter": ("25.2", "50.3", "100.7", "201.3"),
    "prefix": ("2.62", "5.24", "7.86", "10.49"),
}
_HALLUCINATION = {"adapter": "13.3", "lora": "16.8", "ia3": "16.0", "prefix": "25.0"}
_MEAN = "mean score of 8 tasks, %"


def _tuned(scale: Scale, model: str, method: str, task: Task, *, connector: bool, **fields) -> RecipeCell:
    """Tuned on a task and tested on it, connector trained or not."""
    labels = {"model": model, "method": method, **fields.pop("labels", {}), "set": task.name}
    train = ("connector",) if connector and method != "none" else ()
    fields = {"data": task.train, "evaluations": (task.test,)} | fields
    return scale.cell(model, method, labels=labels, train=train, **fields)


def methods(scale: Scale) -> Recipe:
    """Every method on every model and task, connector tuned, beside the base as it is."""
    published = [
        Published(
            labels={"model": _LLAVA_7B, "method": method},
            quantity=_MEAN,
            measure="score",
            value=scores[1],
            source=f"{PAPER}, results at 7B",
        )
        for method, scores in _MEAN_SCORE.items()
    ] + [
        Published(
            labels={"model": model, "method": method},
            quantity="trained parameters, %",
            measure="trained_percent",
            value=percent[1],
            source=f"{PAPER}, table 15",
        )
        for model, by_method in STUDY_PERCENT.items()
        for method, percent in by_method.items()
    ]
    return Recipe(
        name="methods",
        title="methods x models",
        source=PAPER,
        rows=("model", "method"),
        cells=tuple(
            _tuned(scale, model, method, task, connector=True)
            for model in scale.models
            for method in ("none", *STUDY_METHODS)
            for task in scale.tasks
        ),
        published=tuple(published),
    )


def connector(scale: Scale) -> Recipe:
    """The connector tuned with each method, or left frozen."""
    return Recipe(
        name="connector",
        title="connector tuned or frozen",
        source=PAPER,
        rows=("model", "method", "connector"),
        cells=tuple(
            _tuned(scale, scale.model, method, task, connector=tuned, labels={"connector": word})
            for method in STUDY_METHODS
            for word, tuned in (("frozen", False), ("tuned", True))
            for task in scale.tasks
        ),
        published=tuple(
            Published(
                labels={"model": _LLAVA_7B, "method": method, "connector": word},
                quantity=_MEAN,
                measure="score",
                value=value,
                source=f"{PAPER}, results at 7B",
            )
            for method, scores in _MEAN_SCORE.items()
            for word, value in zip(("frozen", "tuned"), scores)
        ),
    )


def location(scale: Scale) -> Recipe:
    """Modules beside attention, in the MLP, or both."""
    return Recipe(
        name="location",
        title="location of the modules",
        source=PAPER,
        rows=("model", "method", "location"),
        cells=tuple(
            _tuned(
                scale,
                scale.model,
                method,
                task,
                connector=True,
                settings=located(place),
                labels={"location": place},
            )
            for method in LOCATED
            for place in LOCATIONS
            for task in scale.unseen
        ),
        published=tuple(
            Published(
                labels={"model": _LLAVA_7B, "method": method, "location": place},
                quantity="score, %",
                measure="score",
                value=value,
                source=f"{PAPER}, location at 7B",
            )
            for method, scores in _LOCATION_SCORE.items()
            for place, value in zip(LOCATIONS, scores)
        ),
        notes=("over which tasks the paper's mean at each location goes is not known here; ours goes over the unseen",),
    )


def size(scale: Scale) -> Recipe:
    """Ranks, widths and numbers of virtual tokens."""
    variants = [(method, setting, value) for method, (setting, values) in scale.sizes.items() for value in values]
    steps = [step for _, values in scale.sizes.values() for step in range(1, len(values) + 1)]
    published = [
        Published(
            labels={"model": _LLAVA_7B, "method": method, "step": str(step)},
            quantity="trained parameters, M",
            measure="trained_millions",
            value=value,
            source=f"{PAPER}, module size at 7B",
        )
        for method, values in _SIZE_MILLIONS.items()
        for step, value in enumerate(values, start=1)
    ]
    return Recipe(
        name="size",
        title="size of the modules",
        source=PAPER,
        rows=("model", "method", "step", "size"),
        cells=tuple(
            _tuned(
                scale,
                scale.model,
                method,
                task,
                connector=True,
                settings=sized(method, setting, value),
                labels={"step": str(step), "size": f"{setting}={value}"},
            )
            for (method, setting, value), step in zip(variants, steps)
            for task in scale.unseen
        ),
        published=tuple(published),
        notes=(
            "LoRA's alpha is twice its rank, as in the paper's own setting",
            "the paper counts the prefix as it is after its projection; ours trains the projection and counts that",
        ),
    )


def data_scale(scale: Scale) -> Recipe:
    """A random part of each training set; of one seed, a smaller part is the beginning of a larger one."""
    return Recipe(
        name="data-scale",
        title="number of training samples",
        source=PAPER,
        rows=("model", "method", "samples"),
        cells=tuple(
            _tuned(
                scale,
                scale.model,
                method,
                task,
                connector=True,
                labels={"samples": str(count)},
                data=replace(task.train, limit=count),
            )
            for method in STUDY_METHODS
            for count in scale.counts
            for task in scale.unseen
        ),
    )


def stability(scale: Scale) -> Recipe:
    """Three seeds: mean and standard deviation; the longest prefix beside the usual one."""
    setting, lengths = scale.sizes["prefix"]
    variants = [(method, method, {}) for method in STUDY_METHODS]
    variants.append(("prefix-longest", "prefix", {setting: lengths[-1]}))
    return Recipe(
        name="stability",
        title="stability over seeds",
        source=PAPER,
        rows=("model", "variant", "set"),
        cells=tuple(
            _tuned(
                scale,
                scale.model,
                method,
                task,
                connector=True,
                settings=settings,
                seed=seed,
                labels={"variant": variant, "seed": str(seed)},
            )
            for variant, method, settings in variants
            for task in scale.unseen
            for seed in SEEDS
        ),
        published=(
            Published(
                labels={"model": _LLAVA_7B, "variant": "prefix-longest", "set": "scienceqa"},
                quantity="score over seeds, %",
                measure="score_and_deviation",
                value="56.2 +- 19.2",
                source=f"{PAPER}, prefix of 40 tokens on ScienceQA",
            ),
        ),
    )


def generalisation(scale: Scale) -> Recipe:
    """Tuned for long on one set, tested on it and on the others four times on the way."""
    tasks = scale.unseen[:3] if len(scale.unseen) >= 3 else scale.tasks
    return Recipe(
        name="generalisation",
        title="one set to others, over epochs",
        source=PAPER,
        rows=("model", "method", "set"),
        cells=tuple(
            _tuned(
                scale,
                scale.model,
                method,
                task,
                connector=True,
                evaluations=(task.test, *(other.test for other in tasks if other != task)),
                **_long(scale),
            )
            for method in STUDY_METHODS
            for task in tasks
        ),
        notes=("which set the paper tunes on, and which two it tests, is not known here: each takes its turn",),
    )


def _long(scale: Scale) -> dict:
    """Fields of a long run that is tested four times."""
    return {"training": {"epochs": scale.long_epochs}, "evaluate_every": scale.long_epochs / 4}


def hallucination(scale: Scale) -> Recipe:
    """Tuned for long on choosing texts, captions with objects that are not there counted on the way."""
    return Recipe(
        name="hallucination",
        title="hallucination over epochs",
        source=PAPER,
        rows=("model", "method"),
        cells=tuple(
            _tuned(
                scale,
                scale.model,
                method,
                scale.captions_after,
                connector=True,
                evaluations=(scale.captions, scale.yes_no),
                **_long(scale),
            )
            for method in STUDY_METHODS
        ),
        published=tuple(
            Published(
                labels={"model": _LLAVA_7B, "method": method},
                quantity="hallucinations in 100 captions, by hand, mean of 4 epochs",
                measure="score",
                value=value,
                source=f"{PAPER}, hallucination",
            )
            for method, value in _HALLUCINATION.items()
        ),
        scored=scale.captions.metric,
        over_epochs=True,
        notes=(
            "the paper counted by hand; ours is the share of captions with an object that no reference names",
            "small: shapes that captions name and the picture has not, after tuning on questions about shapes",
        ),
    )
