"""Features once an image: the same training, in every family that can, whoever else uses the folder."""

import copy
import re
from dataclasses import replace

import pytest
import torch

from mmpeft_fast import FuseCallback, LoRA, add_peft, cache_vision, fuse
from mmpeft_fast.data import FEATURES, Collator, Sample, SharedContextCollator, train_tokenizer
from mmpeft_fast.models import FAMILIES, tiny_model, tiny_processor
from mmpeft_fast.train import TrainConfig, train
from mmpeft_fast.train.vision import why_no_vision_cache
from tests.tiny_models import loss_and_grads

WITH = [name for name, family in FAMILIES.items() if family.image_features]
CONFIG = TrainConfig(learning_rate=1e-2, global_batch_size=4, batch_size=2, max_steps=3, warmup_ratio=0.0)


def adapted(family, processor, *, is_fused=True):
    torch.manual_seed(0)
    tokenizer = getattr(processor, "tokenizer", processor)
    model = add_peft(tiny_model(family, tokenizer, seed=0), LoRA(r=4, dropout=0.1))
    return fuse(model) if is_fused else model


def processor_of(family, samples):
    return tiny_processor(family, train_tokenizer(samples, FAMILIES[family].special_tokens))


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


CASES = [(family, Collator, True) for family in WITH] + [
    ("llava", Collator, False),
    *((family, SharedContextCollator, True) for family in WITH if FAMILIES[family].why_not_packed is None),
]


@pytest.mark.parametrize(("family", "kind", "is_fused"), CASES)
def test_training_is_bit_identical(family, kind, is_fused, samples, tmp_path):
    processor = processor_of(family, samples)
    plain = adapted(family, processor, is_fused=is_fused)
    expected = train(plain, CONFIG, samples, kind(processor), cpu=True, progress=False)
    for _ in range(2):  # with an empty folder, and with a full one
        model = adapted(family, processor, is_fused=is_fused)
        collator = kind(processor, features=cache_vision(model, tmp_path))
        found = train(model, CONFIG, samples, collator, cpu=True, progress=False)
        assert found.losses == expected.losses
        for mine, theirs in zip(trained(model), trained(plain), strict=True):
            assert torch.equal(mine, theirs)
    batch = collator(samples)
    assert all("output" in image for image in batch[FEATURES]) and "pixel_values" not in batch
    tower = model.get_submodule(FAMILIES[family].vision_tower[0].removesuffix(".*"))
    tower.register_forward_hook(lambda *_: pytest.fail("the tower has run"))
    model(**batch)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradients_in_double(family, samples, tmp_path):
    """Two samples of one image, one of none, features of images that were met before beside new ones."""
    processor = processor_of(family, samples)
    model = adapted(family, processor).double().eval()
    asked = [samples[0], replace(samples[0], answers=("what else?",)), samples[1]]
    asked.append(replace(samples[0], image=None, questions=("is it so?",)))
    expected = loss_and_grads(model, in_double(Collator(processor)(asked)))
    collator = Collator(processor, features=cache_vision(model, tmp_path))
    model(**in_double(collator(samples[:1])))
    for mixed in (True, False):
        batch = collator(asked)
        assert ["output" in image for image in batch[FEATURES]] == [True, True, not mixed]
        found = loss_and_grads(model, in_double(batch))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-12)


def in_double(value):
    if isinstance(value, dict):
        return {name: in_double(each) for name, each in value.items()}
    if isinstance(value, list):
        return [in_double(each) for each in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_text_alone_and_a_sample_with_its_own_way_to_load(samples, tmp_path):
    class Darker(Sample):
        def load_image(self):
            return super().load_image().point(lambda value: value // 2)

    processor = processor_of("llava", samples)
    model = adapted("llava", processor).eval()
    collator = Collator(processor, features=cache_vision(model, tmp_path))
    text = collator([replace(samples[0], image=None, questions=("is it so?",))])
    assert FEATURES not in text
    model(**text)
    darker = Darker(**vars(samples[0]))
    losses = [model(**collator([sample])).loss for sample in (samples[0], darker, samples[0])]
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == model(**Collator(processor)([darker])).loss
    assert len(list(tmp_path.iterdir())) == 1


def test_what_decides_the_features_decides_the_key(samples, tmp_path):
    processor = processor_of("llava", samples)
    model = adapted("llava", processor)
    revisions = {cache_vision(model, tmp_path).revision, cache_vision(adapted("llava", processor), tmp_path).revision}
    assert len(revisions) == 1
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[3] += 1e-3
    revisions.add(cache_vision(model, tmp_path).revision)
    revisions.add(cache_vision(adapted("llava", processor).bfloat16(), tmp_path).revision)
    model.model.vision_tower.encoder.layers[0].layer_norm1.eps = 1e-3
    revisions.add(cache_vision(model, tmp_path).revision)
    assert len(revisions) == 4
    other = copy.deepcopy(processor)
    other.image_processor.image_mean = [0.4, 0.4, 0.4]
    store = cache_vision(model, tmp_path)
    keys = {Collator(one, features=store)([samples[0]])[FEATURES][0]["key"] for one in (processor, other)}
    keys.add(Collator(processor, features=store)([samples[1]])[FEATURES][0]["key"])
    assert len(keys) == 3


def test_why_features_change(samples, tmp_path):
    processor = processor_of("llava", samples)
    model = add_peft(tiny_model("llava", processor.tokenizer, seed=0), LoRA(r=4), train_connector=True)
    assert why_no_vision_cache(model) == "model.multi_modal_projector.linear_1.weight is trained"
    with pytest.raises(ValueError, match=r"expected a model whose image features stay what they are, but model\.mul"):
        cache_vision(model, tmp_path)
    model = adapted("llava", processor)
    model.model.vision_tower.encoder.layers[1].self_attn.attention_dropout = 0.1
    assert re.fullmatch(r"model\.vision_tower\..*layers\.1\.self_attn .*at random", why_no_vision_cache(model))
    reasons = {"qwen_vl": "Qwen-VL's decoder runs its tower itself", "llama": "it reads text alone"}
    for family, reason in reasons.items():
        assert why_no_vision_cache(adapted(family, processor_of(family, samples))) == reason
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder for vision features, but File exists"):
        cache_vision(adapted("llava", processor), tmp_path / "file")


@pytest.mark.parametrize("is_peft", [True, False])
def test_transformers_trainer(is_peft, samples, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    processor = processor_of("llava", samples)

    def run(with_features):
        model = adapted("llava", processor)
        if is_peft:
            torch.manual_seed(0)
            config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")
            model = get_peft_model(tiny_model("llava", processor.tokenizer, seed=0), config)
        features = cache_vision(model, tmp_path / "features") if with_features else None
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], remove_unused_columns=False,
            use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, learning_rate=1e-2, seed=1,
        )  # fmt: skip
        collator = SharedContextCollator(processor, features=features)
        callbacks = [FuseCallback()] if is_peft else None
        trainer = Trainer(
            model, arguments, data_collator=collator, train_dataset=samples, eval_dataset=samples, callbacks=callbacks
        )
        trainer.train()
        trainer.log_history = trainer.state.log_history
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.evaluate()["eval_loss"]

    assert run(True) == run(False)
    assert len(list((tmp_path / "features").iterdir())) == len(samples)
