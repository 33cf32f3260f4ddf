"""Qwen-VL's ChatML: messages to ids and to what counts in the loss, in one place.

A turn is `<|im_start|>`, role, newline, content, `<|im_end|>`, newline, each tokenised by itself as the publisher does:
a content that begins with a newline keeps it apart from the role's. In the text of a conversation for training every
special token is one, as in the publisher's fine-tuning; in a prompt for inference only those of images, references and
boxes are, as in the publisher's `chat`: whoever writes `<|im_end|>` into a question ends no turn by it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerFast

from mmpeft_fast.models.qwen_vl.images import path_bytes
from mmpeft_fast.models.qwen_vl.tokens import (
    CONTENT_TOKENS,
    IMAGE_END,
    IMAGE_PAD,
    IMAGE_START,
    TURN_END,
    TURN_START,
    normalised,
)

SYSTEM = "You are a helpful assistant."
SPAN = re.compile(f"{IMAGE_START}(.*?){IMAGE_END}", re.DOTALL)
LOSSES = ("publisher", "answers")


@dataclass
class EncodedChat:
    """A conversation: T ids, and for each whether it counts in the loss (of the token before it).

    publisher: of every turn both markers and the newline behind it, and an assistant's text; not the role, nor the
    newline after it. answers: an assistant's text and its `<|im_end|>`. paths: of each image span what stands between
    its tags, nothing where the image is given otherwise.
    """

    input_ids: list[int] = field(default_factory=list)
    publisher: list[bool] = field(default_factory=list)
    answers: list[bool] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def paths_in(text: str) -> list[str]:
    """What stands between the tags of each image span of a text."""
    return [inner.replace(IMAGE_PAD, "") for inner in SPAN.findall(text)]


def encode_chats(
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    num_queries: int,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> list[EncodedChat]:
    """Each conversation's ids and masks.

    Args:
        conversations: lists of messages with `role` and `content`: a string, or parts of the types "text" and "image",
            the latter with a `path` where that is to be in the prompt.
        num_queries: ids of an image span.
        add_generation_prompt: opens the assistant's turn at the end: a prompt for inference.
        continue_final_message: leaves the last turn open: a prompt for inference too.

    Raises:
        ValueError: no messages, an image tag that is not closed, a path that does not fit its span.
    """
    is_prompt = add_generation_prompt or continue_final_message
    special = CONTENT_TOKENS if is_prompt else tokenizer.all_special_tokens
    known = tokenizer.get_vocab()
    special = re.compile("(" + "|".join(re.escape(token) for token in special if token in known) + ")")
    chats, parts = [], []  # parts: (chat, plain text or ids, counts for the publisher, counts as an answer)
    start, end = ([token] for token in tokenizer.convert_tokens_to_ids([TURN_START, TURN_END]))
    for messages in conversations:
        if not messages:
            raise ValueError("Qwen-VL: expected a conversation of one message or more, got none")
        chat = EncodedChat()
        chats.append(chat)
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        images = 0
        for message in messages:
            is_answer = message["role"] == "assistant"
            content, images = _content(message, images)
            parts += [(chat, start, True, False), (chat, message["role"], False, False), (chat, "\n", False, False)]
            for piece in _pieces(tokenizer, content, special, num_queries, chat.paths):
                parts.append((chat, piece, is_answer, is_answer))
            parts += [(chat, end, True, is_answer), (chat, "\n", True, False)]
        if continue_final_message:
            del parts[-2:]
        if add_generation_prompt:
            parts += [(chat, start, True, False), (chat, "assistant", False, False), (chat, "\n", False, False)]
    texts = list(dict.fromkeys(piece for _, piece, _, _ in parts if isinstance(piece, str)))
    ids_of = dict(zip(texts, plain_ids(tokenizer, texts), strict=True))
    for chat, piece, publisher, answer in parts:
        ids = ids_of[piece] if isinstance(piece, str) else piece
        chat.input_ids += ids
        chat.publisher += [publisher] * len(ids)
        chat.answers += [answer] * len(ids)
    return chats


def plain_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Ids of each text, in which no special token is one."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []


def encode_batch(
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[EncodedChat],
    *,
    padding: Any = False,
    truncation: bool = False,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: str | None = None,
    return_tensors: str | None = None,
    mask: str | None = None,
) -> BatchEncoding:
    """`input_ids`, `attention_mask` and with `mask` ("publisher" or "answers") `assistant_masks`, lists or [B, T].

    Raises:
        ValueError: another mask.
    """
    if mask not in (None, *LOSSES):
        raise ValueError(f"loss: expected 'publisher' or 'answers', got {mask!r}")
    cut = max_length if truncation else None
    rows = {"input_ids": [chat.input_ids[:cut] for chat in chats]}
    encoded = tokenizer.pad(
        rows, padding=padding, max_length=max_length, pad_to_multiple_of=pad_to_multiple_of, padding_side=padding_side,
        return_attention_mask=True,
    )  # fmt: skip
    if mask is not None:
        side = padding_side or tokenizer.padding_side
        masks = []
        for chat, ids in zip(chats, encoded["input_ids"], strict=True):
            counted = list(map(int, getattr(chat, mask)))[:cut]
            zeros = [0] * (len(ids) - len(counted))
            masks.append(zeros + counted if side == "left" else counted + zeros)
        encoded["assistant_masks"] = masks
    return BatchEncoding(dict(encoded), tensor_type=return_tensors)


def conversations_of(conversation: Any) -> tuple[list, bool]:
    """A list of conversations from one or several, and whether it was several."""
    if not conversation:
        raise ValueError("Qwen-VL: expected a conversation of one message or more, got none")
    is_batch = not isinstance(conversation[0], Mapping)
    return (list(conversation) if is_batch else [conversation]), is_batch


def with_shown_paths(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], num_queries: int) -> list[int]:
    """The ids with the text of its path in each whole span, in place of bytes and padding."""
    start, end, pad = tokenizer.convert_tokens_to_ids([IMAGE_START, IMAGE_END, IMAGE_PAD])
    ids, shown, position = [int(token) for token in ids], [], 0
    while position < len(ids):
        shown.append(ids[position])
        position += 1
        span = ids[position : position + num_queries]
        is_whole = shown[-1] == start and ids[position + num_queries : position + num_queries + 1] == [end]
        if is_whole and all(token < 256 or token == pad for token in span):
            path = bytes(token for token in span if token != pad).decode(errors="replace")
            shown += plain_ids(tokenizer, [path])[0]
            position += num_queries
    return shown


def _content(message: Mapping[str, Any], images: int) -> tuple[str, int]:
    """A message's text, with its images as `Picture N: <img>PATH</img>` and a newline; and how many there were so
    far."""
    content = message["content"]
    if isinstance(content, str):
        return content, images
    text = ""
    for part in content:
        if part["type"] == "image":
            images += 1
            path = part.get("path")
            text += f"Picture {images}: {IMAGE_START}{path if isinstance(path, str) else IMAGE_PAD}{IMAGE_END}\n"
        elif part["type"] == "text":
            text += part["text"]
        else:
            raise ValueError(f"Qwen-VL: expected parts of the types 'text' and 'image', got {part['type']!r}")
    return text, images


def _pieces(
    tokenizer: PreTrainedTokenizerFast, text: str, special: re.Pattern, num_queries: int, paths: list[str]
) -> Iterator[str | list[int]]:
    """Plain texts, and the ids of spans and special tokens; spans' paths are added to `paths`."""
    text, position = normalised(text), 0
    for span in SPAN.finditer(text):
        yield from _plain_and_special(tokenizer, text[position : span.start()], special)
        path = span[1].replace(IMAGE_PAD, "")
        paths.append(path)
        yield span_ids(tokenizer, path, num_queries)
        position = span.end()
    if IMAGE_START in text[position:]:
        raise ValueError(f"Qwen-VL: expected {IMAGE_END} behind each {IMAGE_START}, got {text[position:][:60]!r}")
    yield from _plain_and_special(tokenizer, text[position:], special)


def span_ids(tokenizer: PreTrainedTokenizerFast, path: str, num_queries: int) -> list[int]:
    """An image's ids: `<img>`, the bytes of its path and padding, `</img>`."""
    start, end, pad = tokenizer.convert_tokens_to_ids([IMAGE_START, IMAGE_END, IMAGE_PAD])
    data = list(path_bytes(path, num_queries)) if path else []
    return [start, *data, *[pad] * (num_queries - len(data)), end]


def _plain_and_special(tokenizer: PreTrainedTokenizerFast, text: str, special: re.Pattern) -> Iterator[str | list[int]]:
    for index, piece in enumerate(special.split(text)):
        if piece:
            yield [tokenizer.convert_tokens_to_ids(piece)] if index % 2 else piece
