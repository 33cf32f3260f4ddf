"""LLaVA's shape around another decoder than LLaMA: the same family, whatever its text configuration says."""

import pytest
import torch
from transformers import MistralConfig, Qwen2Config, Qwen3Config

from mmpeft_fast import add_peft, fuse, load_peft, make_method, save_peft
from mmpeft_fast.models import FAMILIES
from tests.closeness import assert_same_in_double
from tests.tiny_models import (
    VOCABULARY,
    loss_and_grads,
    randomize_trainable,
    small_settings,
    tiny_batch,
    token_id,
)

DECODERS = {"mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def model_over(kind):
    family = FAMILIES["llava"]
    config = family.tiny_config(VOCABULARY, token_id)
    text = config.text_config
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    config.text_config = DECODERS[kind](
        **{name: getattr(text, name) for name in sizes}, num_hidden_layers=2, num_key_value_heads=2, head_dim=64,
        sliding_window=None, pad_token_id=text.pad_token_id,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return family.model_class(config).double()


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix"])
@pytest.mark.parametrize("kind", DECODERS)
def test_fused_saved_and_loaded(kind, method, tmp_path):
    model = add_peft(model_over(kind), make_method(method, **small_settings(method)))
    randomize_trainable(model)
    model, batch = model.double().train(), tiny_batch("llava", dtype=torch.float64, padding_side="left")
    loss, grads = loss_and_grads(model, batch)
    fused_loss, fused_grads = loss_and_grads(fuse(model, strict=True), batch)
    assert_same_in_double(fused_loss, loss)
    for name, grad in grads.items():
        assert_same_in_double(fused_grads[name], grad, name)
    save_peft(model, tmp_path)
    assert_same_in_double(loss_and_grads(load_peft(model_over(kind), tmp_path).train(), batch)[0], loss)
