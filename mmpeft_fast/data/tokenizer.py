"""A small byte-level BPE tokenizer trained on a data set's own text, for models built from a configuration."""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmpeft_fast.data.conversations import IMAGE_MARK, Sample

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# The words that the families' chat templates (Vicuna, ChatML) put around the turns of every sample.
TEMPLATE_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    " USER: ",
    " ASSISTANT: ",
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
)
_NUM_BYTES = 256


def train_tokenizer(
    samples: Sequence[Sample],
    special_tokens: Iterable[str],
    *,
    vocab_size: int = 512,
    padding_side: str = "right",
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on all questions, answers and the templates' fixed words.

    special_tokens: the family's own (image marks, turn marks); pad, bos and eos are added. vocab_size: an upper bound,
    special tokens included. The same samples give the same tokenizer. Raises ValueError for a vocabulary too small to
    hold the 256 bytes and the special tokens, or an unknown padding side.
    """
    specials = list(dict.fromkeys((PAD, BOS, EOS, *special_tokens)))
    smallest = _NUM_BYTES + len(specials)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size: expected at least {smallest} (256 bytes, {len(specials)} special), got {vocab_size}"
        )
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side: expected 'right' or 'left', got {padding_side!r}")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(samples), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[token for token in specials if token not in (PAD, BOS, EOS)],
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )


def _texts(samples: Sequence[Sample]) -> Iterator[str]:
    """Every text as often as training sees it; answers with the space that stands before them in most templates."""
    for sample in samples:
        yield from TEMPLATE_TEXT
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            yield question.replace(IMAGE_MARK, "").strip()
            yield answer
            yield f" {answer}"
