"""Qwen's tokenizer from `qwen.tiktoken`: NFC, a pre-tokenisation pattern, and byte-level BPE by ranks.

A fast tokenizer of `tokenizers` needs merges. A pair of tokens may merge where their concatenation is a token, the
lowest rank first, so the merges are all splits of each token into two tokens, in the order of the ranks.
"""

import base64
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY_FILE = "qwen.tiktoken"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
# They take the ids behind the ranks, in this order.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
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
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML. What the publisher's and the study's fine-tuning count in the loss is inside `generation`: of every turn both
# markers and the newline behind it, and an assistant's text; not the role, nor the newline after it. The very first
# marker is nobody's next token and stays outside. An image part is
# `<img>PATH</img>`, or a placeholder where it has no path.
_START = "{% generation %}<|im_start|>{% endgeneration %}"
_END = "{% generation %}<|im_end|>{{ '\\n' }}{% endgeneration %}"
CHAT_TEMPLATE = (
    "{% set images = namespace(count=0) %}"
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant." + _END + "{% endif %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] == 'system' %}<|im_start|>{% else %}"
    + _START
    + "{% endif %}{{ message['role'] }}{{ '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endgeneration %}"
    "{% elif message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set images.count = images.count + 1 %}"
    "Picture {{ images.count }}: <img>{{ part['path'] if part['path'] is string else '<imgpad>' }}</img>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}" + _END + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def normalised(text: str) -> str:
    """NFC, as the publisher's tokenizer begins; halves of surrogate pairs are joined, alone they become U+FFFD."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", whole)


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Tokens and ranks of a file with a base64 token and its rank in each line.

    Raises:
        ValueError: the file is not of that form, ranks are not 0, 1, 2, .., or a single byte is missing.
    """
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if line:
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: expected a base64 token and its rank ({error})") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(
            f"{path}: expected all 256 bytes among tokens with the ranks 0, 1, 2, .., got {len(ranks)} tokens"
        )
    return ranks


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in `tokenizers`' byte-level vocabularies."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]


def _splits(token: bytes, ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every way to make `token` of two tokens.

    By ranks they all have one priority; in a list of merges one comes before the other. That would matter where two
    splits overlap (tokens A, B, C with A B = B C = `token`), a state that merging by ranks was not seen to reach.
    """
    for cut in range(1, len(token)):
        if token[:cut] in ranks and token[cut:] in ranks:
            yield token[:cut], token[cut:]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a `qwen.tiktoken` file, with ChatML as its chat template.

    Padding is `<|endoftext|>`, as in the publisher's fine-tuning; a turn ends with `<|im_end|>`.

    Raises:
        ValueError: not such a file.
    """
    ranks = read_ranks(path)
    characters = _byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = [(text(left), text(right)) for token in by_rank for left, right in _splits(token, ranks)]
    vocabulary = {text(token): rank for token, rank in ranks.items()}
    # A piece that is a token as a whole is that token, even where no merges lead to it.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
