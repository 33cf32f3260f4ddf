"""Merged models: plain ones that compute what the tuned ones did."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from mmpeft_fast import IA3, Adapter, DoRA, LayerNorm, LoRA, Prefix, VeRA, add_peft, fuse, is_fused, merge_peft
from mmpeft_fast.layers.class_swap import is_swapped
from mmpeft_fast.stored.baseline import add_baseline
from tests.closeness import assert_as_close_as_eager, assert_exact
from tests.tiny_models import randomize_trainable, tiny_batch, tiny_model

METHODS = {
    "lora": LoRA(r=4, alpha=9, dropout=0.3, targets="both"),
    "lora-rank-stabilized": LoRA(r=3, alpha=5, targets=("o", "gate"), rank_stabilized=True),
    "dora": DoRA(r=4, alpha=9, targets=("o", "gate", "down")),
    "vera": VeRA(r=5, targets=("o", "gate")),
    "ia3": IA3(targets=("k", "gate", "down")),
    "layernorm": LayerNorm(final=True, head=True),
}
FAMILIES = ("llava", "qwen2_vl", "qwen_vl")


def method_for(family, name):
    """Of IA3 one with a biased output: k, or qkv where it is one layer."""
    return IA3(targets=("qkv", "gate", "down")) if (family, name) == ("qwen_vl", "ia3") else METHODS[name]


def tuned(family, method, *, dtype=torch.float64, by="add_peft", train_connector=True):
    model = tiny_model(family, num_layers=1, dtype=dtype)
    add = add_peft if by == "add_peft" else lambda *args, **options: add_baseline(*args, **options)[0]
    model = add(model, method, train_connector=train_connector)
    randomize_trainable(model)
    return model.to(dtype).eval()


def logits(model, family):
    with torch.no_grad():
        dtype = next(model.parameters()).dtype
        return model(**tiny_batch(family, dtype=dtype)).logits


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("by", ["add_peft", "HF PEFT"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_plain_and_the_same_function(family, name, by):
    plain = tiny_model(family, num_layers=1, dtype=torch.float64)
    model = tuned(family, method_for(family, name), by=by)
    expected = logits(model, family)
    assert not torch.equal(expected, logits(plain.eval(), family))
    if name in ("lora", "layernorm"):
        fuse(model)
    merged = merge_peft(model)
    assert merged is (model.get_base_model() if isinstance(model, PeftModel) else model)
    assert classes(merged) == classes(plain) and not is_fused(merged)
    assert {n: p.dtype for n, p in merged.named_parameters()} == {n: p.dtype for n, p in plain.named_parameters()}
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert_exact(logits(merged, family), expected)
    with pytest.raises(ValueError, match="expected a model with PEFT parameters, got a plain"):
        merge_peft(merged)


@pytest.mark.parametrize("by", ["add_peft", "HF PEFT"])
@pytest.mark.parametrize("family, name", [("llava", "ia3"), ("qwen2_vl", "lora"), ("qwen_vl", "layernorm")])
def test_transformers_loads_what_was_merged(family, name, by, tmp_path):
    model = fuse(tuned(family, method_for(family, name), dtype=torch.float32, by=by))
    merged = merge_peft(model, tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="sdpa")
    loaded.eval().requires_grad_(
        False
    )  # as the merged one: torch's attention has other rounding where nothing is trained
    for key, value in merged.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(logits(loaded, family), logits(merged, family))


@pytest.mark.parametrize("by", ["add_peft", "HF PEFT"])
@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_half_precision_weights_are_rounded_once(name, by):
    model = tiny_model("qwen2_vl", num_layers=1, dtype=torch.bfloat16)
    add = add_peft if by == "add_peft" else lambda *args: add_baseline(*args)[0]
    model = add(model, METHODS[name])
    randomize_trainable(model)
    wide = merge_peft(copy.deepcopy(model).double())
    merged = merge_peft(model)
    truth = wide.state_dict()
    for key, value in merged.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert_as_close_as_eager(value, truth[key].bfloat16(), truth[key], key)


def test_a_magnitude_leaves_the_bias():
    """On q, k and v, which have one: HF PEFT's form of it is refused there."""
    model = tuned("qwen2_vl", DoRA(r=4, alpha=9))
    expected = logits(model, "qwen2_vl")
    assert_exact(logits(merge_peft(model), "qwen2_vl"), expected)


def test_sums_are_formed_in_float32():
    """A weight that almost cancels its branch: what is left shows every bit that was rounded away before."""
    model = add_peft(tiny_model("llava", num_layers=1, dtype=torch.bfloat16), LoRA(r=4, alpha=9, targets=("q",)))
    randomize_trainable(model)
    q = model.model.language_model.layers[0].self_attn.q_proj
    with torch.no_grad():
        q.weight.copy_(-9 / 4 * (q.branches[0].up @ q.branches[0].down))

    def sums(dtype):
        return q.weight.to(dtype) + 9 / 4 * (q.branches[0].up.to(dtype) @ q.branches[0].down.to(dtype))

    eager, truth = sums(torch.float32).bfloat16(), sums(torch.float64)
    merge_peft(model)
    assert_as_close_as_eager(q.weight, eager, truth)


def test_widened_gains_return_to_the_models_dtype():
    plain = tiny_model("llava", num_layers=1, dtype=torch.bfloat16)
    model = add_peft(copy.deepcopy(plain), METHODS["layernorm"])
    randomize_trainable(model)
    gains = {name: value.clone() for name, value in model.state_dict().items() if value.dtype == torch.float32}
    assert len(gains) == 3
    merged = merge_peft(fuse(model))
    assert classes(merged) == classes(plain)
    for name, gain in gains.items():
        assert torch.equal(merged.state_dict()[name], gain.bfloat16())


def test_embeddings_that_hf_peft_trained_apart_are_saved_apart(tmp_path):
    config = tiny_model("llava", num_layers=1).config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    base = type(tiny_model("llava", num_layers=1))(config)
    model = get_peft_model(base, LoraConfig(target_modules=["o_proj"], modules_to_save=["lm_head"]))
    randomize_trainable(model.eval())
    expected = logits(model, "llava")
    merged = merge_peft(model, tmp_path / "merged")
    assert not torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)
    assert not merged.config.tie_word_embeddings and not merged.config.text_config.tie_word_embeddings
    loaded = type(base).from_pretrained(tmp_path / "merged", attn_implementation="sdpa").eval()
    assert torch.equal(logits(loaded, "llava"), logits(merged, "llava"))
    torch.testing.assert_close(logits(merged, "llava"), expected)


def test_several_active_adapters():
    model = get_peft_model(tiny_model("llava", num_layers=1), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "second"])
    randomize_trainable(model.double().eval())
    expected = logits(model, "llava")
    assert_exact(logits(merge_peft(model), "llava"), expected)


@pytest.mark.parametrize(
    "method, message",
    [
        (Adapter(bottleneck=3), "has a branch that cannot be merged: tanh makes it nonlinear"),
        (Prefix(num_virtual_tokens=3), "a prefix cannot be merged: its keys and values stand beside"),
    ],
)
def test_what_cannot_be_merged(method, message):
    model = fuse(add_peft(tiny_model("llava", num_layers=1), method))
    with pytest.raises(ValueError, match=message):
        merge_peft(model)
    assert is_fused(model)


@pytest.mark.parametrize(
    "prepare, message",
    [
        (
            lambda model: get_peft_model(model, LoraConfig(target_modules=["embed_tokens"])),
            "cannot merge .*embed_tokens: .*Embedding.*; its merge_and_unload may",
        ),
        (
            lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_bias=True)),
            r"q_proj has a bias computed from an adapter.s parameters; expected lora_bias=False|cannot merge .*q_proj",
        ),
        (lambda model: add_baseline(model, Prefix(num_virtual_tokens=3))[0], "a prefix cannot be merged"),
    ],
)
def test_hf_pefts_that_cannot_be_merged(prepare, message):
    model = prepare(tiny_model("llava", num_layers=1))
    randomize_trainable(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        merge_peft(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_disabled_adapters_are_not_dropped_silently():
    model = add_baseline(tiny_model("llava", num_layers=1), LoRA(r=2))[0]
    with model.disable_adapter(), pytest.raises(ValueError, match="expected enabled adapters"):
        merge_peft(model)


def test_shared_weights_are_refused():
    model = tuned("llava", LoRA(r=2, targets=("q",)))
    layer = model.model.language_model.layers[0].self_attn
    layer.k_proj = nn.Linear(1, 1, bias=False)
    layer.k_proj.weight = layer.q_proj.weight
    with pytest.raises(ValueError, match=r"expected .*q_proj to have a weight of its own"):
        merge_peft(model)


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = tuned("llava", METHODS["lora"])
    expected = logits(model, "llava")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        merge_peft(model, tmp_path)
    assert torch.equal(logits(model, "llava"), expected) and not any(is_swapped(module) for module in model.modules())
