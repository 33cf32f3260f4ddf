"""The study's metrics on what models wrote: one name a metric, the first number of each is its headline.

A metric takes the predictions and their samples and returns named numbers, fractions but for CIDEr (0 to 10).
"""

from collections.abc import Callable, Sequence
from statistics import fmean

from mmpeft_fast.data.sets import TaskSample
from mmpeft_fast.study.metrics.cider import cider
from mmpeft_fast.study.metrics.objects import SHAPES, hallucination
from mmpeft_fast.study.metrics.options import chosen
from mmpeft_fast.study.metrics.pope import pope
from mmpeft_fast.study.metrics.vqa import exact_match, vqa_score

__all__ = ["METRICS", "Metric", "score"]

Metric = Callable[[Sequence[str], Sequence[TaskSample]], dict[str, float]]


def _option_accuracy(predictions: Sequence[str], samples: Sequence[TaskSample]) -> dict[str, float]:
    """The answer of a sample is its choice's letter or text."""
    pairs = [
        (chosen(said, each.choices), chosen(each.answers[0], each.choices)) for said, each in zip(predictions, samples)
    ]
    return {
        "accuracy": fmean(said == right for said, right in pairs),
        "no_option": fmean(said is None for said, _ in pairs),
    }


METRICS: dict[str, Metric] = {
    "option_accuracy": _option_accuracy,
    "exact_match": lambda predictions, samples: {
        "accuracy": fmean(exact_match(said, each.answers[0]) for said, each in zip(predictions, samples))
    },
    "vqa_score": lambda predictions, samples: {
        "vqa_score": fmean(vqa_score(said, each.references) for said, each in zip(predictions, samples))
    },
    "cider": lambda predictions, samples: {"cider": fmean(cider(predictions, [each.references for each in samples]))},
    "pope": lambda predictions, samples: pope(predictions, [each.answers[0] for each in samples]),
    "hallucination": lambda predictions, samples: hallucination(predictions, [each.references for each in samples]),
    "shape_hallucination": lambda predictions, samples: hallucination(
        predictions, [each.references for each in samples], vocabulary=SHAPES
    ),
}


def score(metric: str, predictions: Sequence[str], samples: Sequence[TaskSample]) -> dict[str, float]:
    """The metric of that name. Raises ValueError for an unknown one, unequal numbers and none."""
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if not samples or len(predictions) != len(samples):
        raise ValueError(
            f"{metric}: expected as many predictions as samples and at least one, got {len(predictions)} "
            f"predictions and {len(samples)} samples"
        )
    return METRICS[metric](predictions, samples)
