"""Conversations for models of text alone: the processor is a tokenizer with a chat template."""

import copy
from dataclasses import replace

import pytest
import torch

from mmpeft_fast.data import IGNORE_INDEX, Collator, train_tokenizer
from mmpeft_fast.models import FAMILIES, tiny_processor

# As published text models have it: content is a string.
STRING_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def conversations(samples):
    """The samples without their images."""
    return [
        replace(
            sample, questions=(sample.questions[0].replace("<image>", "").strip(), *sample.questions[1:]), image=None
        )
        for sample in samples
    ]


@pytest.fixture(scope="module", params=["llama", "qwen2", "a string template"])
def tokenizer(request, conversations):
    family = "qwen2" if request.param == "qwen2" else "llama"
    tokenizer = tiny_processor(family, train_tokenizer(conversations, FAMILIES[family].special_tokens))
    if request.param == "a string template":
        tokenizer.chat_template = STRING_TEMPLATE
    return tokenizer


def answers_of(tokenizer, labels):
    """The labelled tokens of one row as text."""
    return tokenizer.decode(labels[labels != IGNORE_INDEX])


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_are_the_answers_and_their_end_tokens(tokenizer, conversations, side):
    batch = Collator(tokenizer, padding_side=side)(conversations)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "supervised_capacity", "right_padded"}
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.all_special_tokens else "</s>"
    for sample, row, mask, labels in zip(
        conversations, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        expected = "".join(answer + end for answer in sample.answers)
        assert answers_of(tokenizer, labels).replace(" ", "") == expected.replace(" ", "")
        assert torch.equal(labels[labels != IGNORE_INDEX], row[labels != IGNORE_INDEX])
        assert mask[labels != IGNORE_INDEX].all() and (row[mask == 0] == tokenizer.pad_token_id).all()
        assert row[mask == 1][0] != row[mask == 1][1]  # the template's first token is not written a second time


def test_prompt_is_the_training_text_up_to_the_first_answer(tokenizer, conversations):
    collator = Collator(tokenizer)
    for sample in conversations:
        batch, prompt = collator([sample]), collator.encode_prompt(sample)
        first = (batch["labels"][0] != IGNORE_INDEX).nonzero()[0]
        assert torch.equal(prompt["input_ids"][0], batch["input_ids"][0, :first])


def test_long_samples_are_cut_but_not_all_labels(tokenizer, conversations):
    labels = Collator(tokenizer)(conversations[:1])["labels"][0]
    first = int((labels != IGNORE_INDEX).nonzero()[0])
    assert Collator(tokenizer, max_length=first + 1)(conversations[:1])["labels"].shape == (1, first + 1)
    with pytest.raises(ValueError, match=f"the first begins at token {first + 1}"):
        Collator(tokenizer, max_length=first)(conversations[:1])


def test_an_image_is_refused(tokenizer, samples):
    collator = Collator(tokenizer)
    for call in (
        lambda: collator(samples),
        lambda: collator.encode_prompt(samples[0]),
        lambda: collator.check(samples),
    ):
        with pytest.raises(ValueError, match=r"expected a conversation without an image, .* got the image .*0\.png"):
            call()


def test_a_processor_takes_samples_with_and_without_images(processor, samples):
    Collator(processor).check(samples)


def test_padding_without_a_padding_token(tokenizer, conversations):
    """The published tokenizers of LLaMA and Mistral have none; what stands on padding changes nothing."""
    batch = Collator(tokenizer)(conversations)
    bare = _without_padding(tokenizer)
    again = Collator(bare)(conversations)
    assert (again["input_ids"][again["attention_mask"] == 0] == bare.eos_token_id).all()
    for name in ("attention_mask", "labels"):
        assert torch.equal(batch[name], again[name])
    bare.eos_token = None
    with pytest.raises(ValueError, match="expected a padding or an end-of-sequence token"):
        Collator(bare)


def _without_padding(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    return bare


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    bare = _without_padding(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="expected a chat template"):
        Collator(bare)
