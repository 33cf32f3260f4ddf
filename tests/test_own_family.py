"""A family from outside of the package: InternVL (Chen et al. 2024) as transformers ships it, in one file."""

import json

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor, Qwen2Config
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast

from mmpeft_fast import (
    FAMILIES,
    Family,
    add_peft,
    cli,
    fuse,
    fuse_report,
    load_peft,
    make_method,
    register_family,
    save_peft,
)
from mmpeft_fast.models.images import ImageShape
from mmpeft_fast.models.inputs import training_batch
from mmpeft_fast.stored.baseline import add_baseline
from tests.closeness import assert_same_in_double
from tests.tiny_models import loss_and_grads, randomize_trainable


class Pixels:
    """One size, given as height and width; a quarter of the patches become tokens."""

    def shape(self, config, image_size):
        height, _ = config.vision_config.image_size
        if image_size not in (None, height):
            raise ValueError(f"image_size: {config.model_type} takes {height} pixels, got {image_size}")
        return ImageShape((config.image_token_id,) * config.image_seq_length, side=height)

    def inputs(self, config, shape, count, ids, empty):
        return {"pixel_values": empty(count, 3, shape.side, shape.side)}


def config_of(vision: dict, text: dict, tokens: int, image_token: int) -> InternVLConfig:
    return InternVLConfig(
        vision_config=InternVLVisionConfig(**vision),
        text_config=Qwen2Config(**text),
        image_token_id=image_token,
        image_seq_length=tokens,
    )


def tiny_config(vocabulary, token_id) -> InternVLConfig:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return config_of(
        vision | {"image_size": (32, 32), "patch_size": (8, 8)},
        text | {"intermediate_size": 96, "vocab_size": vocabulary, "max_position_embeddings": 512},
        4,
        token_id("<IMG_CONTEXT>"),
    )


def size_8b() -> InternVLConfig:
    text = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    return config_of({}, text | {"intermediate_size": 18944, "vocab_size": 151674}, 256, 151667)


INTERNVL = Family(
    name="internvl",
    model_class=InternVLForConditionalGeneration,
    processor_class=InternVLProcessor,
    model_types=("internvl",),
    decoder="model.language_model",
    connector=("model.multi_modal_projector",),
    vision_tower=("model.vision_tower",),
    image=Pixels(),
    output_class=InternVLCausalLMOutputWithPast,
    sizes={"internvl3-8b": size_8b},
    tiny_config=tiny_config,
    tiny_processor=lambda tokenizer: None,
    special_tokens=("<IMG_CONTEXT>",),
    chat_template="",
)


@pytest.fixture
def registered():
    """In the place of the package's own InternVL, which this one knows nothing of."""
    before = dict(FAMILIES)
    del FAMILIES["internvl"]
    register_family(INTERNVL)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def tiny(dtype=torch.float64):
    config = tiny_config(80, lambda token: 3)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return InternVLForConditionalGeneration(config).to(dtype)


def batch_of(model):
    return training_batch(
        model.config, lambda *sizes, dtype: torch.randn(*sizes, dtype=dtype), batch_size=2, seq_len=20,
        labelled=6, images=1, image_size=None, dtype=torch.float64,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "ia3", "adapter", "prefix", "layernorm"])
def test_it_is_fused_saved_and_loaded(registered, name, tmp_path):
    method = make_method(name, **({"dropout": 0.0} if name in ("lora", "adapter") else {}))
    models = [add_peft(tiny(), method), fuse(add_peft(tiny(), method)), fuse(add_baseline(tiny(), method)[0])]
    for model in models:
        randomize_trainable(model)
        model.double().train()
    assert not fuse_report(models[1]).kept
    batch = batch_of(models[0])
    loss, grads = loss_and_grads(models[0], batch)
    fused_loss, fused_grads = loss_and_grads(models[1], batch)
    assert fused_grads.keys() == grads.keys()
    assert_same_in_double(fused_loss, loss)
    for key, grad in grads.items():
        assert_same_in_double(fused_grads[key], grad, key)
    assert models[1](**batch).logits is None, "the token-sparse tail has not run"

    save_peft(models[1], tmp_path / "adapter")
    loaded = load_peft(tiny(), tmp_path / "adapter").train()
    assert_same_in_double(loss_and_grads(loaded, batch)[0], loss)


def test_it_is_planned(registered, capsys):
    assert cli.main(["plan", "--model", "internvl3-8b", "--device", "h100", "--seq-len", "600", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 7.3e9 < found["frozen_params"] < 8e9 and found["step_ms"] > 0


def test_names_that_are_taken(registered):
    with pytest.raises(ValueError, match="there is a family 'llava' already"):
        register_family(Family(**vars(INTERNVL) | {"name": "llava"}))
    with pytest.raises(ValueError, match="model type 'internvl' is of family 'internvl' already"):
        register_family(Family(**vars(INTERNVL) | {"name": "internvl3"}))


@pytest.mark.filterwarnings("ignore")
def test_a_family_answers_for_its_forwards_as_they_stand(registered, monkeypatch):
    """What is patched after it was registered is not known."""
    shipped = InternVLForConditionalGeneration.forward

    def changed(self, *args, **kwargs):
        return shipped(self, *args, **kwargs)

    monkeypatch.setattr(InternVLForConditionalGeneration, "forward", changed)
    report = fuse_report(fuse(add_peft(tiny(), make_method("lora"))))
    assert list(report.kept) == ["InternVLForConditionalGeneration"]
