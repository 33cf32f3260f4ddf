"""Qwen's tokenizer from `qwen.tiktoken`: NFC, a pre-tokenisation pattern, and byte-level BPE by ranks.

A fast tokenizer of `tokenizers` needs merges. A pair of tokens may merge where their concatenation is a token, the
lowest rank first, so the merges are all splits of each token into two tokens, in the order of the ranks.
"""

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast

from mmpeft_fast.models.qwen_vl.chat import SYSTEM, conversations_of, encode_batch, encode_chats, with_shown_paths
from mmpeft_fast.models.qwen_vl.tokens import SPECIAL_TOKENS, TURN_END, normalised

VOCABULARY_FILE = "qwen.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The same ChatML as text. Ids and what counts in the loss are `chat.encode_chats`'s: tokenised from this text a content
# that begins with a newline would merge with the newline after its role. An image part is `<img>PATH</img>`, or a
# placeholder where it has no path.
CHAT_TEMPLATE = (
    "{% set images = namespace(count=0) %}"
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}{{ '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set images.count = images.count + 1 %}"
    "Picture {{ images.count }}: <img>{{ part['path'] if part['path'] is string else '<imgpad>' }}</img>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class QwenVLTokenizer(PreTrainedTokenizerFast):
    """Text to ids and back; conversations by `chat.encode_chats`. `num_queries`: ids of an image span."""

    # Without an `__init__` of its own: transformers rebuilds the backend of classes that have one.
    @property
    def num_queries(self) -> int:
        return self.init_kwargs.get("num_queries", 256)

    def _encode_plus(self, text, text_pair=None, **kwargs):
        return super()._encode_plus(text=_normalised(text), text_pair=_normalised(text_pair), **kwargs)

    def _decode(self, token_ids, *args, **kwargs) -> str:
        """A prompt shows `<img>PATH</img>`, not the bytes of the path and the padding."""
        ids = token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        return super()._decode(with_shown_paths(self, ids, self.num_queries), *args, **kwargs)

    def apply_chat_template(
        self,
        conversation,
        *args,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        return_tensors: str | None = None,
        tokenizer_kwargs: dict | None = None,
        loss: str = "publisher",
        **kwargs,
    ):
        """As transformers' own; `assistant_masks` is the mask that `loss` names, "publisher" or "answers"."""
        prompt = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        if not tokenize:
            return super().apply_chat_template(conversation, *args, tokenize=False, **prompt, **kwargs)
        conversations, is_batch = conversations_of(conversation)
        chats = encode_chats(self, conversations, num_queries=self.num_queries, **prompt)
        mask = loss if return_assistant_tokens_mask else None
        options = {**kwargs, **(tokenizer_kwargs or {})}
        encoded = encode_batch(self, chats, return_tensors=return_tensors, mask=mask, **options)
        if not is_batch and return_tensors is None:
            encoded = BatchEncoding({name: rows[0] for name, rows in encoded.items()})
        return encoded if return_dict else encoded["input_ids"]


def _normalised(text):
    """Every text in (lists of) texts."""
    if isinstance(text, str):
        return normalised(text)
    return text if text is None else type(text)(_normalised(one) for one in text)


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


def load_tokenizer(path: str | Path, *, num_queries: int = 256) -> QwenVLTokenizer:
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
    return QwenVLTokenizer(
        tokenizer_object=backend,
        num_queries=num_queries,
        eos_token=TURN_END,
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (TURN_END, "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
