"""One added line in scripts that exist: what HF PEFT, torch and users do around a fused model keeps its meaning."""

import copy
import logging
import pickle

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from torch import nn

from mmpeft_fast import LoRA, add_peft, fuse, fuse_report, is_fused, unfuse
from mmpeft_fast.layers.class_swap import is_swapped
from tests.closeness import assert_as_close_as_eager
from tests.test_parity import assert_same_training_step, prepared
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

DECODER = r".*language_model.*\.({})"


def with_peft(family, config, *, num_layers=2):
    model = get_peft_model(tiny_model(family, num_layers=num_layers), config)
    randomize_trainable(model)
    return model.train()


def layers_of(model):
    return model.get_base_model().model.language_model.layers if hasattr(model, "get_base_model") else (
        model.model.language_model.layers
    )  # fmt: skip


PEFT_CONFIGS = {
    "two of seven targets": LoraConfig(r=4, target_modules=DECODER.format("k_proj|down_proj")),
    "ranks and alphas by pattern": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=DECODER.format("(q|k|v|o|gate|up|down)_proj"),
        rank_pattern={r".*layers\.0.*q_proj": 2, "up_proj": 7},
        alpha_pattern={"v_proj": 3, r".*layers\.1.*down_proj": 32},
    ),
    "rank-stabilised": LoraConfig(r=9, lora_alpha=5, use_rslora=True, target_modules=DECODER.format("(q|up)_proj")),
    "biases of the base": LoraConfig(r=4, bias="lora_only", target_modules=DECODER.format("(q|k|v|gate)_proj")),
    "biases of the branches": LoraConfig(r=4, lora_bias=True, target_modules=DECODER.format("(q|v|o|down)_proj")),
    "some layers": LoraConfig(
        r=4, target_modules=["o_proj", "gate_proj"], layers_to_transform=[1], layers_pattern="layers"
    ),
    "head and embeddings saved": LoraConfig(
        r=4, target_modules=DECODER.format("(q|v)_proj"), modules_to_save=["lm_head", "embed_tokens"]
    ),
    "ia3": IA3Config(
        target_modules=DECODER.format("(q|v|up|down)_proj"), feedforward_modules=DECODER.format("down_proj")
    ),
    "ln-tuning": LNTuningConfig(target_modules=DECODER.format("(input_layernorm|norm)")),
}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_whatever_peft_configures(family, name):
    model = with_peft(family, PEFT_CONFIGS[name])
    assert_same_training_step(model, tiny_batch(family))
    assert not fuse_report(model).kept


def test_several_adapters_active_at_once():
    model = with_peft("llava", LoraConfig(r=4, target_modules=DECODER.format("(q|v|up)_proj")))
    model.add_adapter("other", LoraConfig(r=3, target_modules=DECODER.format("(q|o)_proj")))
    model.base_model.set_adapter(["default", "other"])
    randomize_trainable(model)
    assert_same_training_step(model, tiny_batch("llava"))


def test_merged_and_unmerged_after_fuse():
    model = fuse(with_peft("qwen2_vl", LoraConfig(r=4, target_modules=DECODER.format("(q|v|up|down)_proj"))))
    batch = tiny_batch("qwen2_vl")
    expected = model(**batch).loss
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).loss, expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch).loss, expected)


def test_what_cannot_be_fused_stays_is_named_and_works():
    """A variant of LoRA (MiCA) in one layer, LoRA in the vision tower: the rest is fused."""
    targets = LoraConfig(r=4, target_modules=r".*(language_model\.layers\.0|vision_tower.*layers\.[01]).*q_proj")
    model = with_peft("llava", targets)
    model.add_adapter(
        "mica", LoraConfig(r=2, init_lora_weights="mica", target_modules=DECODER.format("layers.1.*v_proj"))
    )
    model.base_model.set_adapter(["default", "mica"])
    randomize_trainable(model)
    with pytest.warns(UserWarning, match=r"fuse: 3 of 7 modules stay as they were: .*layers\.1: LoRA adapter 'mica'"):
        assert_same_training_step(model, tiny_batch("llava"), strict=False)
    report = fuse_report(model)
    assert len(report.kept) == 3 and "outside the decoder" in str(report)
    assert "decoder layers" in str(report).splitlines()[1] and "1/2" in str(report).splitlines()[1]
    assert [is_swapped(layer) for layer in layers_of(model)] == [True, False]
    unfuse(model)
    with pytest.raises(ValueError, match="LoRA adapter 'mica' is a MiCALinearVariant"):
        fuse(model, strict=True)
    assert not is_fused(model)


def test_unknown_architectures_are_named_and_left_alone():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="nothing is fused: Sequential has model type 'Sequential'; expected one of"):
        assert fuse(model) is model
    assert "Sequential" in str(fuse_report(model)) and not any(is_swapped(module) for module in model.modules())
    with pytest.raises(ValueError, match="expected a model, got str"):
        fuse("llava")


def test_report_before_and_after():
    model = add_peft(tiny_model("llava"), LoRA(r=4))
    assert set(fuse_report(model).kept.values()) == {"not fused so far; fuse(model) takes it in"}
    fuse(model, strict=True)
    assert str(fuse_report(model)).splitlines() == [
        "part            fused  stays as it was",
        "decoder layers    2/2",
        "final norm        1/1",
        "head and loss     1/1",
        "vision tower      1/1",
    ]


def test_an_adapter_that_cannot_be_fused_is_switched_on_and_off(caplog):
    model = with_peft("llava", LoraConfig(r=4, target_modules=DECODER.format("q_proj")))
    model.add_adapter("mica", LoraConfig(r=2, init_lora_weights="mica", target_modules=DECODER.format("v_proj")))
    randomize_trainable(model)
    batch = tiny_batch("llava")
    eager = {name: model.set_adapter(name) or loss_and_grads(model, batch) for name in ("default", "mica")}
    model.set_adapter("default")
    fuse(model, strict=True)
    with caplog.at_level(logging.WARNING, logger="mmpeft_fast"):
        for name in ("default", "mica", "default", "mica"):
            model.set_adapter(name)
            loss, grads = loss_and_grads(model, batch)
            torch.testing.assert_close(loss, eager[name][0])
            for key, grad in eager[name][1].items():
                torch.testing.assert_close(grads[key], grad, rtol=1e-3, atol=1e-6)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "layer 0 runs unfused",
        "layer 1 runs unfused",
    ]


@pytest.mark.parametrize("where", ["layer", "linear", "norm", "attention", "head"])
def test_hooks_run(where):
    model = add_peft(tiny_model("llava"), LoRA(r=4, alpha=8, dropout=0.0)).train()
    randomize_trainable(model)
    layer = layers_of(model)[1]
    module = {
        "layer": layer,
        "linear": layer.mlp.up_proj,
        "norm": layer.input_layernorm,
        "attention": layer.self_attn,
        "head": model.lm_head,
    }[where]
    fuse(model)
    seen, batch = [], tiny_batch("llava")
    plain = loss_and_grads(model, batch)
    handles = [
        module.register_forward_hook(lambda _, args, output: seen.append("forward")),
        module.register_full_backward_hook(lambda _, dx, dy: seen.append("backward")),
    ]
    hooked = loss_and_grads(model, batch)
    assert seen == ["forward", "backward"]
    for handle in handles:
        handle.remove()
    again = loss_and_grads(model, batch)
    assert len(seen) == 2 and torch.equal(again[0], plain[0])
    torch.testing.assert_close(hooked[0], plain[0])
    for name, grad in plain[1].items():
        torch.testing.assert_close(hooked[1][name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen_vl"])
@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "prefix", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(family, method, dtype):
    model = prepared(family, method)
    batch = tiny_batch(family)
    truth = loss_and_grads(
        copy.deepcopy(model).double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    )

    def run():
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(**batch).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    eager, fused = run(), (fuse(model), run())[1]

    def flat(grads):
        return torch.cat([grads[name].flatten().double() for name in sorted(truth[1])])

    assert fused[0].dtype == torch.float32 and fused[1].keys() == eager[1].keys()
    assert_as_close_as_eager(flat(fused[1]).to(dtype), flat(eager[1]).to(dtype), flat(truth[1]), "all gradients")


def test_float16_with_gradient_scaling_and_accumulation():
    """Two micro-batches, scaled: the same parameters as the unfused model's after five steps."""
    results = []
    for is_to_fuse in (False, True):
        model = add_peft(tiny_model("llava", num_layers=1), LoRA(r=4, alpha=8, dropout=0.0)).train()
        randomize_trainable(model)
        if is_to_fuse:
            fuse(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, scaler = torch.optim.SGD(trained, lr=0.05), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(5):
            for micro in range(2):
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = model(**tiny_batch("llava", seed=2 * step + micro)).loss / 2
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**10
        results.append(torch.cat([parameter.detach().flatten() for parameter in trained]))
    start = add_peft(tiny_model("llava", num_layers=1), LoRA(r=4, alpha=8, dropout=0.0))
    randomize_trainable(start)
    begin = torch.cat([parameter.detach().flatten() for parameter in start.parameters() if parameter.requires_grad])
    moved = torch.linalg.vector_norm(results[0] - begin)
    assert torch.linalg.vector_norm(results[1] - results[0]) < 0.02 * moved


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix", "layernorm"])
def test_moved_cast_pickled_and_frozen_after_fuse(method):
    model = fuse(prepared("llava", method))
    batch = tiny_batch("llava")
    loss, grads = loss_and_grads(model, batch)

    twin = prepared("llava", method)
    twin.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    torch.testing.assert_close(fuse(twin)(**batch).loss, loss)

    wide = model.to(torch.float64)
    truth = wide(**{key: value.double() if value.is_floating_point() else value for key, value in batch.items()}).loss
    torch.testing.assert_close(truth.float(), loss)
    torch.testing.assert_close(model.to("cpu", torch.float32)(**batch).loss, loss)

    names = sorted(grads)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names[::2])
    _, fewer = loss_and_grads(model, batch)
    assert sorted(fewer) == names[::2]
    for name in fewer:
        torch.testing.assert_close(fewer[name], grads[name], rtol=1e-3, atol=1e-6)


def test_no_grad_and_inference_mode():
    model = fuse(add_peft(tiny_model("qwen2_vl"), LoRA(r=4, alpha=8, dropout=0.0)))
    batch = tiny_batch("qwen2_vl")
    expected = model.train()(**batch).loss
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = model(**batch).loss
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected.detach())
            assert model.eval()(**batch).logits.shape[:2] == batch["input_ids"].shape
            model.train()


def test_layers_that_are_shared_or_torn_apart_are_refused_with_a_reason():
    model = tiny_model("llava", num_layers=3)
    layers_of(model)[1] = layers_of(model)[0]
    with pytest.raises(ValueError, match="the same layer occurs more than once"):
        fuse(model, strict=True)
    model = tiny_model("llava")
    layers_of(model)[1].mlp.to("meta")
    with pytest.raises(ValueError, match="its parameters lie on cpu, meta; expected one device"):
        fuse(model, strict=True)
    model = tiny_model("llava")
    layers_of(model)[0].self_attn.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="the forward of a LlamaAttention was replaced"):
        fuse(model, strict=True)


def test_offloaded_layers_stay_as_they_are():
    from accelerate import cpu_offload

    model = tiny_model("llava").eval()
    batch = tiny_batch("llava")
    with torch.no_grad():
        expected = model(**batch).logits
        cpu_offload(layers_of(model)[1], execution_device="cpu", offload_buffers=True)
        with pytest.warns(UserWarning, match="1 of 5 modules stay as they were: .*layers.1: the forward of a"):
            fuse(model)
        torch.testing.assert_close(model(**batch).logits, expected)


class Wrapped(torch.Tensor):
    """A weight that is not its elements in memory, as quantising and sharding libraries have them."""


def test_a_quantised_base_stays_and_works():
    from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear

    model = with_peft("llava", LoraConfig(r=4, target_modules=DECODER.format("(q|v)_proj"))).eval()
    mlp = layers_of(model)[0].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(mlp, name)
        linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
        setattr(mlp, name, QuantizedLinear.from_float(linear))
    weight = layers_of(model)[1].self_attn.o_proj.weight
    layers_of(model)[1].self_attn.o_proj.weight = nn.Parameter(weight.detach().as_subclass(Wrapped), False)
    batch = tiny_batch("llava")
    with torch.no_grad():
        expected = model(**batch).logits
        with pytest.warns(UserWarning, match=r"2 of 5 modules stay .*layers\.0: a layer of type \S+quantized\S+"):
            fuse(model)
        assert "a weight is a Wrapped; expected a plain tensor" in str(fuse_report(model))
        torch.testing.assert_close(model(**batch).logits, expected)


def test_tied_embeddings_train_as_one():
    model = tiny_model("llava", num_layers=1)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    add_peft(model, LoRA(r=4, alpha=8, dropout=0.0))
    randomize_trainable(model)
    model.lm_head.weight.requires_grad_(True)
    assert_same_training_step(model.train(), tiny_batch("llava"))


def test_a_hook_may_change_a_layers_output_in_place():
    model = add_peft(tiny_model("llava"), LoRA(r=4, alpha=8, dropout=0.0)).train()
    randomize_trainable(model)
    for layer in layers_of(model):
        layer.register_forward_hook(lambda _, args, output: output.mul_(1.1))
    loss, grads = loss_and_grads(model, tiny_batch("llava"))
    fused_loss, fused_grads = loss_and_grads(fuse(model, strict=True), tiny_batch("llava"))
    torch.testing.assert_close(fused_loss, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-3, atol=1e-6)
