"""Prompt forms of the study's tasks (arXiv 2406.05130, appendix on instruction templates), as pure functions.

Each takes one item's fields and returns the user's text without the image mark; `with_image` puts the mark in front.
"""

from collections.abc import Callable, Sequence
from string import ascii_uppercase

from mmpeft_fast.data.conversations import IMAGE_MARK

SHORT_ANSWER = "Answer the question using a single word or phrase."
CAPTION_REQUESTS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Create a compact narrative representing the image presented.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
)


def vqa(question: str) -> str:
    """VQAv2, OKVQA, OCRVQA and easy-vqa."""
    return f"{question} {SHORT_ANSWER}"


def vizwiz(question: str) -> str:
    """VizWiz: some questions cannot be answered from the image."""
    return f'{question} When the information is insufficient, respond with "Unanswerable". {SHORT_ANSWER}'


def science_qa(question: str, choices: Sequence[str]) -> str:
    """ScienceQA: lettered choices; the answer is a letter. Raises ValueError unless there are 2 to 26 choices."""
    _check_choices("science_qa", choices, at_most=len(ascii_uppercase))
    listed = ", ".join(f"{letter}.{choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    return f"{question} {listed}"


def iconqa_txt(question: str, choices: Sequence[str]) -> str:
    """IconQA, choose a text: the answer is one of the choices. Raises ValueError for fewer than 2 choices."""
    _check_choices("iconqa_txt", choices)
    return f"{question} Choices: {', '.join(choices)}. Choose an option from the choices to answer the question."


def iconqa_blank(question: str) -> str:
    """IconQA, fill in the blank."""
    return f"{question} Fill in the blanks in () or answer this question."


def caption(paraphrase: int = 0) -> str:
    """Flickr30k captions: one of `CAPTION_REQUESTS`, counted modulo their number."""
    return CAPTION_REQUESTS[paraphrase % len(CAPTION_REQUESTS)]


PROMPTS: dict[str, Callable[..., str]] = {
    "vqa": vqa,
    "vizwiz": vizwiz,
    "science_qa": science_qa,
    "iconqa_txt": iconqa_txt,
    "iconqa_blank": iconqa_blank,
    "caption": caption,
}
"""Every form of the study by the name of its task."""


def with_image(prompt: str) -> str:
    """The prompt as LLaVA's conversation JSON writes it: the image first."""
    return f"{IMAGE_MARK}\n{prompt}"


def _check_choices(form: str, choices: Sequence[str], at_most: int | None = None) -> None:
    if isinstance(choices, str) or len(choices) < 2 or (at_most is not None and len(choices) > at_most):
        bound = "at least 2" if at_most is None else f"2 to {at_most}"
        raise ValueError(f"{form}: expected {bound} choices, got {choices!r}")
