"""POPE (Li et al. 2023): yes-or-no answers on whether an object is in the image; "yes" is the positive class."""

from collections.abc import Sequence


def says_yes(answer: str) -> bool:
    """The official parser: "no" where the first sentence has the word No, no or not, "yes" otherwise."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of "yes"; a ratio without cases is 0.

    labels: "yes" or "no".
    """
    said, right = [says_yes(answer) for answer in predictions], [label == "yes" for label in labels]
    hits = sum(a and b for a, b in zip(said, right, strict=True))
    precision, recall = _ratio(hits, sum(said)), _ratio(hits, sum(right))
    return {
        "accuracy": sum(a == b for a, b in zip(said, right)) / len(right),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": sum(said) / len(said),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
