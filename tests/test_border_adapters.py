"""Every adapter of HF PEFT that our ops do not know works on a fused decoder as on a plain one, in both orders."""

import peft
import pytest
import torch

from mmpeft_fast import fuse, fuse_report
from tests.closeness import assert_same_in_double
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

_BATCH = tiny_batch("llama")
_TARGETS = ["q_proj", "down_proj"]


def _cpt():
    return peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[5, 6, 7, 8],
        cpt_mask=[1, 1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3, 4],
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.95,
        opt_projection_epsilon=0.2,
        opt_projection_format_epsilon=0.1,
    )


# What is written above or into the model: prompts, another attention, a second model beside it, other linear layers.
_CONFIGS = {
    "cpt": _cpt,
    "adaption_prompt": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
    "shadow": lambda: peft.ShadowConfig(task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16, encoder_num_layers=1
    ),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[7, 20, 33]),
    "hra": lambda: peft.HRAConfig(task_type="CAUSAL_LM", target_modules=_TARGETS),
    "loha": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=_TARGETS),
    "vera": lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], r=4),
    "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=_TARGETS, use_dora=True),
}
_NEW = {"shadow": "ShadowConfig"}
_HERE = [name for name in _CONFIGS if hasattr(peft, _NEW.get(name, "LoraConfig"))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("first", ["adapter", "fuse"])
@pytest.mark.parametrize("name", _HERE)
def test_an_adapter_works_on_a_fused_decoder(name, first, training):
    plain = peft.get_peft_model(tiny_model("llama", dtype=torch.float64), _CONFIGS[name]())
    randomize_trainable(plain)
    plain.double().train(training)
    base = tiny_model("llama", dtype=torch.float64)
    fused = peft.get_peft_model(base if first == "adapter" else fuse(base), _CONFIGS[name]())
    fused = fuse(fused) if first == "adapter" else fused
    fused.load_state_dict(plain.state_dict())
    fused.double().train(training)

    torch.manual_seed(0)
    expected, grads = loss_and_grads(plain, _BATCH)
    torch.manual_seed(0)
    loss, got = loss_and_grads(fused, _BATCH)
    assert_same_in_double(loss, expected)
    assert grads and got.keys() == grads.keys()
    for key, grad in grads.items():
        assert_same_in_double(got[key], grad, key)


@pytest.mark.filterwarnings("ignore")
def test_prompts_run_over_a_fused_decoder():
    model = fuse(peft.get_peft_model(tiny_model("llama"), _CONFIGS["prompt"]()))
    assert not fuse_report(model).kept
    plain = peft.get_peft_model(tiny_model("llama"), _CONFIGS["prompt"]())
    logits = [each.train()(**_BATCH).logits for each in (plain, model)]
    assert logits[1].shape == logits[0].shape, "whoever made the embeddings may read the logits"
