"""A fused model is copied, pickled and made anew like any other."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from mmpeft_fast import LayerNorm, LoRA, Prefix, add_peft, fuse, fuse_report, is_fused, unfuse
from mmpeft_fast.layers.class_swap import is_swapped, own_class
from tests.closeness import assert_as_close_as_eager
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def lora_of_hf_peft(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def prefix_of_hf_peft(model):
    return get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


METHODS = {
    "lora": lambda model: add_peft(model, LoRA(r=2, dropout=0.0)),
    "layernorm": lambda model: add_peft(model, LayerNorm()),
    "prefix": lambda model: add_peft(model, Prefix(num_virtual_tokens=4)),
    "lora of HF PEFT": lora_of_hf_peft,
    "prefix of HF PEFT": prefix_of_hf_peft,
}
COPIES = {"pickle": through_pickle, "torch.save": through_torch, "deepcopy": copy.deepcopy}


def tuned(method, family="llama", dtype=torch.float32):
    model = METHODS[method](tiny_model(family, num_layers=1, dtype=dtype))
    randomize_trainable(model)
    return model.train()


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_is_fused_and_on_its_own(method, way):
    batch = tiny_batch("llama")
    model = fuse(tuned(method))
    expected = loss_and_grads(model, batch)
    twin = COPIES[way](model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert is_fused(twin) and not fuse_report(twin).kept
    with torch.no_grad():  # a copy that still read the original would see this
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    loss, grads = loss_and_grads(twin, batch)
    # Weights that shared a buffer no longer do, so that a product may be rounded otherwise.
    truth = loss_and_grads(tuned(method, dtype=torch.float64).double(), batch)
    assert_as_close_as_eager(loss, expected[0], truth[0])
    assert grads.keys() == expected[1].keys()
    for name, grad in grads.items():
        assert_as_close_as_eager(grad, expected[1][name], truth[1][name], name)
    assert not any(is_swapped(module) for module in unfuse(twin).modules())


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("method", METHODS)
def test_what_was_fused_once_is_copied_plain(method, way):
    batch = tiny_batch("llama")
    expected = loss_and_grads(tuned(method), batch)
    truth = loss_and_grads(tuned(method, dtype=torch.float64).double(), batch)
    twin = COPIES[way](unfuse(fuse(tuned(method))))
    assert not is_fused(twin)
    loss, grads = loss_and_grads(twin, batch)
    assert_as_close_as_eager(loss, expected[0], truth[0])
    assert grads.keys() == expected[1].keys()


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl", "qwen_vl"])
def test_the_class_of_a_fused_model_makes_plain_ones(family, tmp_path):
    plain = tiny_model(family, num_layers=1)
    plain.save_pretrained(tmp_path)
    kind = type(fuse(plain))
    config = copy.deepcopy(plain.config)
    for made in (kind(config), kind._from_config(config), kind.from_pretrained(tmp_path, dtype=torch.float32)):
        assert type(made) is own_class(plain) and not is_fused(made)
    for name, value in made.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
