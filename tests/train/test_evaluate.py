from dataclasses import replace

import pytest
import torch

from mmpeft_fast import add_peft, fuse, make_method
from mmpeft_fast.data import Collator
from mmpeft_fast.train import TrainConfig, evaluate_accuracy, train


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


def test_no_samples(make_model, collator):
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        evaluate_accuracy(make_model(), collator, [])
    assert torch.is_grad_enabled()
