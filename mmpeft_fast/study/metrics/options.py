"""Option accuracy: which of the choices an answer means."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

_LETTER_FIRST = re.compile(r"\(?([A-Z])(?:[.):]|$)")
_SAID = re.compile(r"answer is \(?([A-Z])\b")


def chosen(prediction: str, choices: Sequence[str]) -> int | None:
    """The index of the choice that an answer means; None where it means none.

    In this order: the choice's text, its letter ("B", "B.", "(B) ..."), and, said once, "the answer is B". Texts are
    compared without case, outer spaces and a last period, and come first, as a choice may be a letter itself.
    """
    texts = [_plain(choice) for choice in choices]
    said = _plain(prediction)
    if said in texts:
        return texts.index(said)
    found = _LETTER_FIRST.match(prediction.strip())
    letters = [found[1]] if found else _SAID.findall(prediction)
    index = ascii_uppercase.index(letters[0]) if len(letters) == 1 else len(choices)
    return index if index < len(choices) else None


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").casefold()
