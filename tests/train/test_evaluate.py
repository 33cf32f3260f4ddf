from dataclasses import replace

import pytest
import torch

from mmpeft_fast import add_peft, fuse, make_method
from mmpeft_fast.data import Collator, train_tokenizer
from mmpeft_fast.models import FAMILIES, tiny_model, tiny_processor
from mmpeft_fast.train import TrainConfig, evaluate_accuracy, generate_answers, train


def generated_answer(model, collator, sample):
    prompt = collator.encode_prompt(sample)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return collator.processor.tokenizer.decode(tokens)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_accuracy_is_that_of_greedy_generation(make_model, samples, collator, side, fused):
    collator = Collator(collator.processor, padding_side=side)
    model = add_peft(make_model(), make_method("layernorm"))
    if fused:
        fuse(model)
    config = TrainConfig(learning_rate=1e-2, global_batch_size=4, batch_size=4, max_steps=60)
    train(model, config, samples[:4], collator, progress=False, cpu=True)
    model.train()
    asked = [*samples[:4], replace(samples[0], answers=("blue",)), replace(samples[3], answers=("yes, it is",))]
    expected = [generated_answer(model.eval(), collator, sample) == f" {sample.answers[0]}</s>" for sample in asked]
    assert 0 < sum(expected) < len(asked)
    model.train()
    for batch_size in (1, 4):
        assert evaluate_accuracy(model, collator, asked, batch_size=batch_size) == sum(expected) / len(asked)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["layernorm", "prefix", "lora"])
@pytest.mark.parametrize("fused", [False, True])
def test_answers_of_a_batch_are_those_of_each_sample_alone(make_model, samples, collator, method, fused):
    model = add_peft(make_model(), make_method(method))
    with torch.no_grad():  # answers that differ, long before any training would give them
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    if fused:
        fuse(model)
    # Prompts of unequal length, so that all but one are padded.
    asked = [replace(each, questions=(each.questions[0] + " or that" * (i % 3),)) for i, each in enumerate(samples)]
    model.train()
    alone = [generate_answers(model, collator, [sample], max_new_tokens=12)[0] for sample in asked]
    assert len(set(alone)) == len(alone)
    assert generate_answers(model, collator, asked, batch_size=3, max_new_tokens=12) == alone
    assert model.training


@pytest.mark.parametrize("method", ["layernorm", "prefix", "ia3"])
@pytest.mark.parametrize("fused", [False, True])
def test_questions_on_an_image_share_its_prefill(make_model, samples, collator, method, fused):
    model = add_peft(make_model(), make_method(method))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    if fused:
        fuse(model)
    words = ("what", "which of them is it", "or not", "how many of these are there", "and why")
    # Two images, in turns.
    asked = [replace(samples[i % 2], questions=("<image>\n" + word,)) for i, word in enumerate(words)]
    alone = [generate_answers(model, collator, [sample], max_new_tokens=12)[0] for sample in asked]
    assert len(set(alone)) >= len(alone) - 1
    seen = []
    handle = model.get_submodule("model.vision_tower").register_forward_hook(lambda m, given, y: seen.append(len(y[0])))
    assert generate_answers(model, collator, asked, max_new_tokens=12) == alone
    assert seen == [2]
    assert generate_answers(model, collator, asked, batch_size=2, max_new_tokens=12) == alone
    handle.remove()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_prefill_is_shared_where_tokens_have_three_positions(samples, family, fused):
    """Its keys are at the positions of an image's grid, behind which the questions go on."""
    words = ("what", "which of them is it", "or not", "how many of these are there", "and why")
    # Two images, in turns, of sides that differ.
    asked = [replace(samples[i % 2], questions=("<image>\n" + word,)) for i, word in enumerate(words)]
    tokenizer = train_tokenizer([*samples, *asked], FAMILIES[family].special_tokens)
    collator = Collator(tiny_processor(family, tokenizer))
    model = add_peft(tiny_model(family, tokenizer, seed=0), make_method("ia3"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    if fused:
        fuse(model)
    alone = [generate_answers(model, collator, [sample], max_new_tokens=12)[0] for sample in asked]
    assert len(set(alone)) >= len(alone) - 1
    seen = []
    handle = model.model.visual.register_forward_hook(
        lambda module, args, kwargs, y: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    assert generate_answers(model, collator, asked, max_new_tokens=12) == alone
    assert seen == [2]
    assert generate_answers(model, collator, asked, batch_size=2, max_new_tokens=12) == alone
    handle.remove()


def test_a_trained_answer_is_generated(make_model, samples, collator):
    model = add_peft(make_model(), make_method("layernorm"))
    config = TrainConfig(learning_rate=1e-2, global_batch_size=2, batch_size=2, max_steps=60)
    train(model, config, samples[:2], collator, progress=False, cpu=True)
    assert generate_answers(model, collator, samples[:2]) == ["red", "blue"]


def test_no_samples(make_model, collator):
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        evaluate_accuracy(make_model(), collator, [])
    assert torch.is_grad_enabled()
