"""Qwen-VL's special tokens, and how text begins."""

import unicodedata

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
# They take the ids behind the ranks, in this order.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    TURN_START,
    TURN_END,
    *(f"<|extra_{i}|>" for i in range(205)),
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    IMAGE_START,
    IMAGE_END,
    IMAGE_PAD,
)
# Special in what a user writes, also at inference.
CONTENT_TOKENS = SPECIAL_TOKENS[-9:]


def normalised(text: str) -> str:
    """NFC, as the publisher's tokenizer begins; halves of surrogate pairs are joined, alone they become U+FFFD."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", whole)
