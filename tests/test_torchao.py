"""A frozen base in torchao's weight-only formats: fused equals unfused, and nothing of an unpacked weight is kept."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mmpeft_fast import add_peft, compare, fuse, fuse_report, make_method, merge_peft, saved_bytes, unfuse
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

pytest.importorskip("torchao")
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

LORA = LoraConfig(r=3, target_modules=r"(?!.*vision).*\.(q|k|v|o|gate|up|down)_proj", lora_dropout=0.0)
FORMATS = {"torchao int8": Int8WeightOnlyConfig, "torchao float8": Float8WeightOnlyConfig}
SMALL = {
    "lora": {"r": 3, "alpha": 3.0, "dropout": 0.0},
    "adapter": {"bottleneck": 3, "dropout": 0.0},
    "prefix": {},
    "ia3": {},
}


def model_of(config, *, family: str = "llama", method: str | None = None, dtype=torch.float32) -> nn.Module:
    """method: None for HF PEFT's LoRA."""
    model = tiny_model(family, dtype=dtype)
    head = model.get_output_embeddings()
    quantize_(model, config(), filter_fn=lambda module, name: type(module) is nn.Linear and module is not head)
    model = get_peft_model(model, LORA) if method is None else add_peft(model, make_method(method, **SMALL[method]))
    randomize_trainable(model)
    return model.train()


@pytest.mark.parametrize("method", [None, *SMALL])
@pytest.mark.parametrize("kind", FORMATS)
def test_fused_is_unfused(kind, method):
    model, batch = model_of(FORMATS[kind], method=method), tiny_batch("llama")
    loss, grads = loss_and_grads(model, batch)
    fused = fuse(copy.deepcopy(model))
    report = fuse_report(fused)
    assert not report.kept and report.formats == dict.fromkeys(report.formats, kind) and len(report.formats) == 2
    assert f"weights unpacked at every call: {kind} in 2 layers" in str(report)
    for other in (fused, unfuse(copy.deepcopy(fused))):
        other_loss, other_grads = loss_and_grads(other, batch)
        assert abs(other_loss - loss) <= 2e-6 * abs(loss)
        assert other_grads.keys() == grads.keys() and grads
        for name, grad in grads.items():
            assert (other_grads[name] - grad).norm() <= 2e-5 * grad.norm(), name
    assert not compare(fused, batch).differing


@pytest.mark.parametrize("kind", FORMATS)
def test_in_bfloat16_and_evaluation(kind):
    model, batch = model_of(FORMATS[kind], family="llava", dtype=torch.bfloat16), tiny_batch("llava")
    comparison = compare(fuse(model), batch)
    assert not comparison.differing, comparison
    model.eval()
    comparison = compare(model, batch)
    assert not comparison.differing and all(row.is_fused for row in comparison.rows)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_kept_is_what_a_dense_base_keeps(kind):
    def kept(model):
        with saved_bytes(model) as saved:
            model(**tiny_batch("llama"))
        return saved.bytes

    assert kept(fuse(model_of(FORMATS[kind]))) == kept(fuse(get_peft_model(tiny_model("llama"), LORA)).train())


def test_quantised_activations_stay_unfused():
    report = fuse_report(fuse(model_of(Int8DynamicActivationInt8WeightConfig)))
    assert "a torchao int8 weight has act_quant_kwargs; expected a weight-only format" in str(report)


def test_what_cannot_be_is_one_sentence(tmp_path):
    model = model_of(Int8WeightOnlyConfig)
    with pytest.raises(ValueError, match=r"dequantise=True, .*_proj is in torchao int8"):
        merge_peft(model, tmp_path / "merged")
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"expects a model that bitsandbytes quantised, .* is in torchao int8"):
        merge_peft(model, dequantise=True)
    llava = tiny_model("llava")
    quantize_(llava, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"got linear_1\.weight quantised to Int8Tensor"):
        add_peft(llava, make_method("lora", r=3), train_connector=True)
