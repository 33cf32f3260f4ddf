"""A small vocabulary file in the publisher's format, trained on text with accents, other scripts and repetitions."""

import base64
import random
from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from mmpeft_fast.models.qwen_vl import load_tokenizer

# The published pre-tokenisation pattern.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (
    "ab", "-=", "aaaa", " ", "\n", "é", "e\u0301", "日本", "😀", "'s", "'S", "don't", "12", "_", "//", "\r\n", "\t",
    "'ſ", "\u00a0", "\u2028", "ab" * 5, "=-" * 7, "xyx", "\u0338", "Ünï", "system", "user", "assistant",
)  # fmt: skip


def random_words(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(WORDS) for _ in range(count))


def write_ranks(path, ranks) -> None:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """`path` and `ranks` of 1,300 tokens or so, whose single bytes do not have their own values as ranks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng = random.Random(0)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=1300, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator([random_words(rng, 50) for _ in range(200)], trainer)
    # A printable byte stands for itself; the others are counted from character 256 on.
    others = iter(byte for byte in range(256) if chr(byte) not in letters)
    byte_of = {letter: ord(letter) if ord(letter) < 256 else next(others) for letter in letters}
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    ranks = {bytes(byte_of[letter] for letter in token): rank for rank, token in enumerate(tokens)}
    path = tmp_path_factory.mktemp("vocabulary") / "qwen.tiktoken"
    write_ranks(path, ranks)
    return SimpleNamespace(path=path, ranks=ranks)


@pytest.fixture(scope="session")
def tokenizer(vocabulary):
    return load_tokenizer(vocabulary.path)
