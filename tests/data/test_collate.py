from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mmpeft_fast.data import HOST_HINTS, IGNORE_INDEX, Collator, train_tokenizer
from mmpeft_fast.models import FAMILIES, tiny_model, tiny_processor

# LLaVA-1.5's published template: it upper-cases roles and ends answers with a space.
PUBLISHED_LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def labelled_runs(labels):
    """Each unbroken run of labelled tokens of one row, as a list of id lists."""
    runs, previous = [], IGNORE_INDEX
    for label in labels.tolist():
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return runs


def end_token(processor):
    return "<|im_end|>" if "<|im_end|>" in processor.tokenizer.all_special_tokens else "</s>"


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_are_the_answers_and_their_end_tokens(processor, samples, side):
    batch = Collator(processor, padding_side=side, loss="answers")(samples)
    tokenizer = processor.tokenizer
    for sample, labels, input_ids, mask in zip(
        samples, batch["labels"], batch["input_ids"], batch["attention_mask"], strict=True
    ):
        answers = [tokenizer.decode(run).strip() for run in labelled_runs(labels)]
        assert answers == [answer + end_token(processor) for answer in sample.answers]
        labelled = labels != IGNORE_INDEX
        assert torch.equal(labels[labelled], input_ids[labelled])
        assert mask[labelled].all()
        assert (input_ids[mask == 0] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_length_of_a_multiple(processor, samples, side):
    plain, padded = (Collator(processor, padding_side=side, multiple_of=n)(samples) for n in (1, 64))
    length, wide = plain["input_ids"].shape[1], padded["input_ids"].shape[1]
    assert wide % 64 == 0 and length < wide < length + 64
    inner = slice(0, length) if side == "right" else slice(wide - length, None)
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(padded[name][:, inner], plain[name])
        outer = torch.ones(wide, dtype=torch.bool)
        outer[inner] = False
        expected = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}[name]
        assert (padded[name][:, outer] == expected).all()
    assert padded["supervised_capacity"] == plain["supervised_capacity"]


def test_batch_has_what_the_contract_says(processor, samples):
    batch = Collator(processor)(samples)
    shape = batch["input_ids"].shape
    for name in ("input_ids", "attention_mask", "labels"):
        assert (batch[name].shape, batch[name].dtype) == (shape, torch.int64)
    assert ("mm_token_type_ids" in batch) == ("image_grid_thw" in batch) == (processor.image_token == "<|image_pad|>")
    targets = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1)
    assert type(batch["supervised_capacity"]) is int
    assert batch["supervised_capacity"] == targets.max() == targets[1]
    num_image_tokens = (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    assert num_image_tokens[0] == num_image_tokens[1] > num_image_tokens[2] == 0
    if "mm_token_type_ids" in batch:
        assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == processor.image_token_id).long())


def test_padding_side_moves_tokens_and_changes_none(processor, samples):
    right, left = (Collator(processor, padding_side=side)(samples) for side in ("right", "left"))
    for name in ("input_ids", "labels"):
        for row in range(len(samples)):
            kept = [batch[name][row][batch["attention_mask"][row] == 1] for batch in (right, left)]
            assert torch.equal(*kept)
    assert (left["attention_mask"][:, -1] == 1).all()
    assert (right["attention_mask"][:, 0] == 1).all()


def test_prompt_is_the_training_text_up_to_the_first_answer(processor, samples):
    collator = Collator(processor, loss="answers")
    for sample in samples:
        batch = collator([sample])
        prompt = collator.encode_prompt(sample)
        first = (batch["labels"][0] != IGNORE_INDEX).nonzero()[0]
        assert torch.equal(prompt["input_ids"][0], batch["input_ids"][0, :first])
        assert ("pixel_values" in prompt) == (sample.image is not None)


def test_text_alone_makes_a_batch_without_images(processor, samples):
    batch = Collator(processor)(samples[2:])
    assert "pixel_values" not in batch
    assert batch["supervised_capacity"] > 0 and batch["right_padded"]


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_vl", "internvl"])
def test_models_take_the_batch_and_padding_side_leaves_the_loss(family, samples):
    tokenizer = train_tokenizer(samples, FAMILIES[family].special_tokens)
    processor = tiny_processor(family, tokenizer)
    model = tiny_model(family, tokenizer, seed=0).double().eval()
    losses = []
    for side in ("right", "left"):
        batch = Collator(processor, padding_side=side)(samples)
        batch = {name: value for name, value in batch.items() if name not in HOST_HINTS}
        losses.append(model(**{**batch, "pixel_values": batch["pixel_values"].double()}).loss)
    torch.testing.assert_close(*losses)


def test_a_template_that_does_not_end_answers_gets_the_end_token(samples):
    processor = tiny_processor("llava", train_tokenizer(samples, FAMILIES["llava"].special_tokens))
    processor.chat_template = PUBLISHED_LLAVA_TEMPLATE
    batch = Collator(processor)(samples)
    for sample, labels in zip(samples, batch["labels"], strict=True):
        answers = [processor.tokenizer.decode(run) for run in labelled_runs(labels)]
        assert answers == [f" {answer}</s>" for answer in sample.answers]


class Rewriting:
    """A processor that writes its texts in another way before it tokenises them."""

    def __init__(self, processor, rewrite):
        self._processor, self._rewrite = processor, rewrite

    def __getattr__(self, name):
        return getattr(self._processor, name)

    def __call__(self, text, **options):
        return self._processor(text=[self._rewrite(each) for each in text], **options)


def test_what_a_processor_writes_around_an_image_shifts_no_label(samples):
    """InternVL's way: the image's tokens between a start and an end."""
    processor = tiny_processor("llava", train_tokenizer(samples, FAMILIES["llava"].special_tokens))
    around = Rewriting(processor, lambda text: text.replace("<image>", "<img> 12 tiles <image></img>"))
    plain, marked = Collator(processor)(samples), Collator(around)(samples)
    assert marked["labels"].shape[1] > plain["labels"].shape[1]
    for ours, theirs in zip(marked["labels"], plain["labels"], strict=True):
        assert labelled_runs(ours) == labelled_runs(theirs)


def test_a_processor_that_moves_the_answers_is_refused(samples):
    processor = tiny_processor("llava", train_tokenizer(samples, FAMILIES["llava"].special_tokens))
    behind = Rewriting(processor, lambda text: text + " and so on and so on")
    with pytest.raises(ValueError, match=r"expected labels on '.*</s>', they would be on '.*': Rewriting writes"):
        Collator(behind)(samples)


def test_a_llama_style_tokenizer_gives_the_same_labels(samples):
    """Spaces as a prefix mark set by a normalizer, byte fallback, and a beginning token that the text does not show."""
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        limit_alphabet=100,
    )
    backend.train_from_iterator([text for sample in samples for text in sample.questions + sample.answers], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
    )
    processor = tiny_processor("llava", tokenizer)
    processor.chat_template = PUBLISHED_LLAVA_TEMPLATE
    collator = Collator(processor, padding_side="left")
    batch = collator(samples)
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for sample, labels, input_ids in zip(samples, batch["labels"], batch["input_ids"], strict=True):
        assert (input_ids == tokenizer.bos_token_id).sum() == 1
        answers = [decoder.decode(tokenizer.convert_ids_to_tokens(run)) for run in labelled_runs(labels)]
        assert answers == [f" {answer}</s>" for answer in sample.answers]


def test_long_samples_are_cut_but_never_image_or_all_labels(processor, samples):
    one, three, _ = samples
    full = Collator(processor, loss="answers")([three])
    runs = (full["labels"][0] != IGNORE_INDEX).nonzero().squeeze(1)
    length = full["input_ids"].shape[1]
    cut = Collator(processor, loss="answers", max_length=int(runs[0]) + 2)([one, three])
    assert torch.equal(cut["input_ids"][1, : int(runs[0]) + 2], full["input_ids"][0, : int(runs[0]) + 2])
    assert cut["input_ids"].shape[1] == int(runs[0]) + 2
    assert cut["labels"].shape == cut["attention_mask"].shape == cut["input_ids"].shape

    with pytest.raises(
        ValueError, match=rf"begin within max_length {int(runs[0])}, .* token {int(runs[0]) + 1} of {length}"
    ):
        Collator(processor, loss="answers", max_length=int(runs[0]))([three])
    image_end = int((full["input_ids"][0] == processor.image_token_id).nonzero()[-1]) + 1
    with pytest.raises(
        ValueError, match=rf"image to end within max_length {image_end - 1}, it ends at token {image_end}"
    ):
        Collator(processor, loss="answers", max_length=image_end - 1)([three])


def test_placeholders_in_the_users_text_are_refused(processor, samples):
    odd = replace(samples[2], questions=(f"what is {processor.image_token}?",), source="data.json entry 5")
    with pytest.raises(ValueError, match=r"data\.json entry 5: expected 0 .* in the templated text, found 1"):
        Collator(processor)([odd])
    with pytest.raises(ValueError, match=r"data\.json entry 5"):
        Collator(processor).encode_prompt(odd)


def test_a_template_that_rewrites_earlier_turns_is_refused(samples):
    processor = tiny_processor("llava", train_tokenizer(samples, FAMILIES["llava"].special_tokens))
    processor.chat_template = "{{ messages | length }}" + PUBLISHED_LLAVA_TEMPLATE
    with pytest.raises(ValueError, match="expected the chat template to only append"):
        Collator(processor)([samples[1]])


@pytest.mark.parametrize("pairs", [1, 2, 40])
def test_the_work_is_linear_in_the_turns(processor, samples, pairs, monkeypatch):
    """What the chat template is given to write grows with the conversation, not with its square."""
    collator, given = Collator(processor, loss="answers"), []
    template = collator._template
    monkeypatch.setattr(
        collator,
        "_template",
        lambda messages, add_generation_prompt=False: (
            given.append(len(messages)) or template(messages, add_generation_prompt)
        ),
    )
    one = samples[2]
    talk = replace(one, questions=one.questions * pairs, answers=tuple(f"answer {i} .." for i in range(pairs)))
    batch = collator([talk])
    runs = labelled_runs(batch["labels"][0])
    ends = end_token(processor)
    assert [processor.tokenizer.decode(run).strip() for run in runs] == [answer + ends for answer in talk.answers]
    assert sum(given) <= 2 * pairs + 9 * pairs


def test_settings_tell_collators_apart(processor, samples):
    plain = Collator(processor)
    before = plain.settings
    plain(samples)
    assert plain.settings == before == Collator(processor).settings
    assert {"padding_side", "max_length", "tokenizer", "processor", "chat_template"} <= before.keys()
    changes = {"padding_side": "left"}, {"max_length": 99}, {"loss": "answers"}, {"multiple_of": 8}
    for other in (Collator(processor, **change) for change in changes):
        assert sum(other.settings[name] != value for name, value in before.items()) == 1


def test_bad_arguments(processor):
    with pytest.raises(ValueError, match="padding_side: expected 'right' or 'left', got 'top'"):
        Collator(processor, padding_side="top")
    with pytest.raises(ValueError, match="max_length: expected an integer of at least 1 or none, got 0"):
        Collator(processor, max_length=0)
    with pytest.raises(ValueError, match="multiple_of: expected an integer of 1 to 65536, got 0"):
        Collator(processor, multiple_of=0)


def test_prompts_of_a_batch_are_padded_on_the_left(processor, samples):
    collator = Collator(processor, padding_side="right")
    batch, alone = collator.encode_prompts(samples), [collator.encode_prompt(sample) for sample in samples]
    for row, prompt in enumerate(alone):
        length = prompt["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(batch[name][row, -length:], prompt[name][0])
        assert not batch["attention_mask"][row, :-length].any()
    images = [prompt["pixel_values"] for prompt in alone if "pixel_values" in prompt]
    assert torch.equal(batch["pixel_values"], torch.cat(images))
