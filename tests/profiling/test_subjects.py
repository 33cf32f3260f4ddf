"""Every family and method as step, layer and op at tiny size."""

import pytest
import torch

from mmpeft_fast import METHODS, profile
from mmpeft_fast.plan.request import Request
from mmpeft_fast.profiling.subjects import TINY_MODELS, config_of, subject
from mmpeft_fast.profiling.tracer import OneRegion, Tracer
from tests.tiny_models import TEXT_FAMILIES, family_method_cases

CPU = torch.device("cpu")
_NAMES = {family: model for model, family in TINY_MODELS.items()}
# A layer of Mistral, Qwen2 or Qwen3 is LLaMA's to a profile.
_MODELS = [model for model in TINY_MODELS if model not in ("tiny-mistral", "tiny-qwen2", "tiny-qwen3")]


def request(model: str, method: str = "lora", **changes) -> Request:
    return Request(
        model=model, method=method, seq_len=96, images=num_images(model), image_size=64, dtype="fp32", **changes
    )


def num_images(model: str) -> int:
    return int(TINY_MODELS[model] not in TEXT_FAMILIES)


def layers(model: str) -> int:
    return 3 if model == "tiny-qwen3-vl" else 1  # deepstack takes the first layers


@pytest.mark.parametrize("model, method", [(_NAMES[family], method) for family, method in family_method_cases(METHODS)])
def test_a_step_of_every_family_and_method(model, method):
    for implementation in ("peft", "fused") if method in ("lora", "prefix") else ("fused",):
        asked = request(model, method, implementation=implementation)
        one = subject("step", asked, config_of(model, layers(model)), CPU)
        with profile(one.model) as p:
            one.run()
        parts = {row.part for row in p.rows}
        assert {"norms", "gemms", "attention", "elementwise", "head", "optimizer"} <= parts
        assert ("vision" in parts) == bool(num_images(model))
        # Qwen-VL's decoder and those of text alone embed their tokens themselves.
        assert "inputs" in parts or model == "tiny-qwen-vl" or not num_images(model)
        assert parts <= {*parts, "connector"} and "outside" not in parts
        assert {row.phase for row in p.rows} == {"forward", "backward", "optimizer"}
        trained = sum(parameter.numel() for parameter in one.model.parameters() if parameter.requires_grad)
        # AdamW reads and writes the parameter and two moments, and reads the gradient, at least once.
        assert sum(row.bytes for row in p.rows if row.part == "optimizer") >= 7 * 4 * trained


@pytest.mark.parametrize("what", ["layer", "op"])
@pytest.mark.parametrize("implementation", ["frozen", "peft", "fused"])
@pytest.mark.parametrize("model", _MODELS)
def test_a_layer_and_an_op_are_of_the_decoder_alone(model, implementation, what):
    config = config_of(model, layers(model))
    one = subject(what, request(model, implementation=implementation), config, CPU)
    one.run()
    with profile(one.model, region=one.region) as p:
        one.run()
    parts = {row.part for row in p.rows}
    assert parts <= {"norms", "gemms", "attention", "elementwise"} and "gemms" in parts
    assert ("attention" in parts) == (what == "layer")
    rows = 96 if what == "op" else None
    if implementation == "frozen" and what == "op":
        text = config.get_text_config()
        heads = text.num_attention_heads + 2 * getattr(text, "num_key_value_heads", text.num_attention_heads)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        # Forward and the gradient of the input.
        assert sum(row.flops for row in p.rows) == 2 * 2 * rows * text.hidden_size * heads * head_dim


@pytest.mark.parametrize("model", _MODELS)
def test_a_fused_layer_computes_every_position(model):
    flops = {}
    for implementation in ("frozen", "fused"):
        asked = request(model, "layernorm-simp", implementation=implementation)
        one = subject("layer", asked, config_of(model, layers(model)), CPU)
        with profile(one.model, region=one.region) as p:
            one.run()
        flops[implementation] = sum(row.flops for row in p.rows if row.part == "gemms")
    assert flops["fused"] == flops["frozen"]


def test_dtypes_and_adapters():
    for dtype, fp32_adapters, expected in (("fp32", True, torch.float32), ("bf16", False, torch.bfloat16)):
        asked = Request(model="tiny-llava", seq_len=96, image_size=64, dtype=dtype, fp32_adapters=fp32_adapters)
        one = subject("op", asked, config_of("tiny-llava", 1), CPU)
        assert {p.dtype for p in one.model.parameters() if p.requires_grad} == {expected}


def test_hf_pefts_prefix_has_no_layer_of_its_own():
    with pytest.raises(ValueError, match="expected step with method prefix and implementation peft, got layer"):
        asked = request("tiny-llava", "prefix", implementation="peft")
        subject("layer", asked, config_of("tiny-llava", 1), CPU)


@pytest.mark.parametrize("num_layers", [0, -1, 5])
def test_layers_that_the_model_does_not_have(num_layers):
    with pytest.raises(ValueError, match=f"expected 1 to 4 for tiny-llava, got {num_layers}"):
        config_of("tiny-llava", num_layers)


def test_a_call_of_a_kernel_set_has_the_flops_of_its_definition():
    from mmpeft_fast.ops import kernels_torch
    from mmpeft_fast.ops.kernel_set import PrologueSpec

    x, gain = torch.randn(130, 33), torch.rand(33)
    dy, weight = torch.randn(130, 7), torch.randn(7, 33)
    tracer = Tracer(OneRegion())
    with tracer:
        spec = PrologueSpec("rms_norm", gain, 1e-6, None)
        h, rstd, _ = tracer.call("prologue", kernels_torch.prologue, (spec, (x,), None), {})
        tracer.call("lowrank_gemm_dx", kernels_torch.lowrank_gemm_dx, (dy, weight), {})
    norm, gemm = tracer.works.values()
    assert (norm.part, norm.op, norm.launches, norm.flops) == ("norms", "prologue rms_norm", 1, 0)
    assert norm.bytes == 4 * (2 * 130 * 33 + 33 + 130) and rstd.numel() == 130
    assert (gemm.part, gemm.kind, gemm.flops) == ("gemms", "gemm", 2 * 130 * 7 * 33)
    assert gemm.bytes == 4 * (130 * 7 + 7 * 33 + 130 * 33) and h.shape == (130, 33)
