"""What HF PEFT makes of LoRA: other initialisations, frozen or shared matrices, a magnitude beside the direction."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer

from mmpeft_fast import (
    DoRA,
    add_peft,
    compare,
    fuse,
    fuse_report,
    merge_peft,
    provider,
    save_peft,
    saved_bytes,
    unfuse,
)
from mmpeft_fast.ops.fused_linear import fused_linear
from mmpeft_fast.ops.row_norms import row_norms
from mmpeft_fast.ops.segments import Branch, Segment
from tests.closeness import assert_as_close_as_eager, assert_same_in_double
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

LINEARS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj|model\.layers.*\.(q|k|v|o|gate|up|down)_proj"
DORA = LoraConfig(r=4, target_modules=LINEARS, use_dora=True)


def model_of(config, family="llama", dtype=torch.float64):
    """Made in float32, which PiSSA and OLoRA ask for."""
    model = get_peft_model(tiny_model(family), copy.deepcopy(config))
    randomize_trainable(model)
    return model.to(dtype).train()


def assert_fused_as_unfused(model, batch):
    loss, grads = loss_and_grads(model, batch)
    report = fuse_report(fuse(model))
    assert not report.kept, report
    fused_loss, fused_grads = loss_and_grads(model, batch)
    assert_same_in_double(fused_loss, loss, "loss")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert fused_grads.keys() == grads.keys() == trained and trained
    for name, grad in grads.items():
        assert_same_in_double(fused_grads[name], grad, name)
    return model


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "eva", "gaussian", "orthogonal"])
def test_initialisations(init):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, init_lora_weights=init)
    assert_fused_as_unfused(model_of(config), tiny_batch("llama"))


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_frozen_matrices_get_no_gradients(name):
    """LoRA-FA freezes D: then nothing but the rank-sized a is kept for dU, and no input of a linear layer."""
    config, batch = LoraConfig(r=4, target_modules=LINEARS), tiny_batch("llama")
    kept = []
    for is_frozen in (False, True):
        model = model_of(config)
        for full, parameter in model.named_parameters():
            if is_frozen and name in full:
                parameter.requires_grad_(False)
        assert_fused_as_unfused(model, batch)
        assert not is_frozen or all(p.grad is None for full, p in model.named_parameters() if name in full)
        with saved_bytes(model) as saved:
            model(**batch)
        kept.append(saved.bytes)
    assert kept[1] < kept[0] if name == "lora_A" else kept[1] <= kept[0]


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_vera(family):
    """D and U are one pair for all layers, buffers without gradients; the two vectors of each layer are trained."""
    config = VeraConfig(r=6, target_modules=LINEARS, projection_prng_key=3)
    model = assert_fused_as_unfused(model_of(config, family), tiny_batch(family, dtype=torch.float64))
    if family == "llama":
        inputs = {name: value for name, value in tiny_batch(family).items() if name != "labels"}
        with torch.no_grad():
            expected = unfuse(model).eval()(**inputs).logits
            assert_same_in_double(merge_peft(fuse(model))(**inputs).logits, expected)


@pytest.mark.parametrize("scaling", [0.5, -2.0])
def test_row_norms(scaling):
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 7), (3, 7), (9, 3))
    )
    assert_same_in_double(row_norms(weight, down, up, scaling), (weight + scaling * up @ down).norm(dim=1))
    gone = row_norms(scaling * up @ down, down, -up, scaling)
    assert (gone >= 0).all() and gone.max() < 1e-6


def test_gradients_of_a_magnitude():
    """Numerically, around norms that stand still: autograd and the op take them for constants."""
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (2, 4), (5, 2), (5,))]
    norms = row_norms(weight, tensors[1].detach(), tensors[2].detach(), 0.5)

    def directed(x, down, up, magnitude):
        direction = magnitude / norms
        segment = Segment(weight, bias / direction, (Branch(down, up, 0.5),), direction)
        return fused_linear(x, [segment])

    def defined(x, down, up, magnitude):
        return magnitude / norms * (x @ weight.t() + 0.5 * x @ down.t() @ up.t()) + bias

    assert_same_in_double(directed(*tensors), defined(*tensors))
    assert torch.autograd.gradcheck(directed, tensors)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_our_dora_is_hf_pefts(family, tmp_path):
    """Loss and every gradient of HF PEFT's model that was loaded from our folder."""
    model = add_peft(tiny_model(family, dtype=torch.float64), DoRA(r=4, alpha=8))
    randomize_trainable(model)
    model, batch = model.double().train(), tiny_batch(family)
    save_peft(model, tmp_path)
    plain = tiny_model(family, dtype=torch.float64)
    judge = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True, autocast_adapter_dtype=False).train()
    expected, expected_grads = loss_and_grads(judge, batch)
    loss, grads = loss_and_grads(fuse(model, strict=True), batch)
    assert_same_in_double(loss, expected)
    names = {"lora_A.default.weight": "branches.0.down", "lora_B.default.weight": "branches.0.up"}
    names["lora_magnitude_vector.default.weight"] = "magnitude"
    for name, grad in expected_grads.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        assert_same_in_double(grads[name.removeprefix("base_model.model.")], grad, name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_vl"])  # without a bias on q, k, v, and with one
@pytest.mark.parametrize("name", ["torch", None])
def test_dora(family, name):
    model, batch = model_of(DORA, family), tiny_batch(family, dtype=torch.float64, padding_side="left")
    if name is None:
        assert not compare(assert_fused_as_unfused(model, batch), batch).differing
    else:
        with provider(name):
            assert_fused_as_unfused(model, batch)


def test_dora_in_bf16_with_wide_adapters():
    batch, dtype = tiny_batch("qwen2"), torch.bfloat16
    model = get_peft_model(tiny_model("qwen2", dtype=dtype), copy.deepcopy(DORA)).train()
    randomize_trainable(model)
    truth = loss_and_grads(copy.deepcopy(model).double(), batch)
    eager, fused = loss_and_grads(model, batch), loss_and_grads(fuse(model, strict=True), batch)

    def flat(grads):
        return torch.cat([grads[name].double().flatten() for name in sorted(truth[1])]).to(dtype)

    assert_as_close_as_eager(flat(fused[1]), flat(eager[1]), flat(truth[1]).double(), "all gradients")


def test_dora_with_dropout_runs_unfused_in_training_alone():
    """HF PEFT multiplies the dropped input by the base weight a second time."""
    model = model_of(LoraConfig(r=4, target_modules=LINEARS, use_dora=True, lora_dropout=0.3)).eval()
    batch = tiny_batch("llama")
    expected = model(**batch).loss
    assert not fuse_report(fuse(model)).kept
    assert_same_in_double(model(**batch).loss, expected)
    model.train()
    assert all("drops inputs of the base layer too" in reason for reason in fuse_report(model).kept.values())
    torch.manual_seed(3)
    loss, grads = loss_and_grads(model, batch)
    torch.manual_seed(3)
    expected, expected_grads = loss_and_grads(unfuse(model), batch)
    assert_same_in_double(loss, expected)
    for name, grad in expected_grads.items():
        assert_same_in_double(grads[name], grad, name)


def test_dora_is_merged_where_there_is_no_bias():
    model = model_of(DORA).eval()
    inputs = {name: value for name, value in tiny_batch("llama").items() if name != "labels"}
    with torch.no_grad():
        expected = model(**inputs).logits
        assert_same_in_double(merge_peft(fuse(model))(**inputs).logits, expected)
    with pytest.raises(ValueError, match="computed from an adapter's parameters"):
        merge_peft(model_of(DORA, "qwen2"))


def test_a_changed_norm_is_followed(monkeypatch):
    model, batch = fuse(model_of(DORA)), tiny_batch("llama")
    plain = DoraLinearLayer.get_weight_norm
    monkeypatch.setattr(
        DoraLinearLayer, "get_weight_norm", lambda self, *args, **given: 2 * plain(self, *args, **given)
    )
    loss, _ = loss_and_grads(model, batch)
    assert_same_in_double(loss, loss_and_grads(unfuse(model), batch)[0])


def test_dora_beside_another_adapter_stays_as_it_was():
    model = model_of(DORA)
    model.add_adapter("second", LoraConfig(r=2, target_modules=LINEARS))
    model.base_model.set_adapter(["default", "second"])
    with pytest.warns(UserWarning, match="active beside others"):
        fuse(model)


@pytest.mark.parametrize(
    "config", [DORA, VeraConfig(r=6, target_modules=LINEARS, projection_prng_key=3)], ids=["dora", "vera"]
)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_several_steps(config, checkpoints):
    """What is computed from parameters when a layer is read is computed again after each step of the optimizer."""
    batches = [tiny_batch("llama", seed=seed) for seed in range(3)]

    def losses(model):
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
        found = []
        for batch in batches:
            for _ in range(2):  # gradients of two passes are summed
                loss = model(**batch).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        with torch.no_grad():
            found.append(model(**batches[0]).loss)
        return torch.stack(found)

    model = model_of(config)
    expected = losses(copy.deepcopy(model))
    assert expected.std() > 1e-3
    assert_same_in_double(losses(fuse(model)), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["dora", "vera", "biases of U", "two IA3"])
def test_a_layer_read_anew_within_a_checkpoint(kind, use_reentrant):
    """Its recomputation, for which nothing has changed, saves as many tensors for the backward."""
    config = {
        "dora": DORA,
        "vera": VeraConfig(r=6, target_modules=LINEARS, projection_prng_key=3),
        "biases of U": LoraConfig(r=4, target_modules=LINEARS, lora_bias=True),
        "two IA3": IA3Config(target_modules=LINEARS, feedforward_modules=r".*down_proj"),
    }[kind]
    model = model_of(config)
    if kind == "two IA3":
        model.add_adapter("second", copy.deepcopy(config))
        model.base_model.set_adapter(["default", "second"])
        randomize_trainable(model.double())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    batch = tiny_batch("llama")
    del batch["labels"]  # with labels the layers are read before the first of them runs

    def logits_and_grads():
        model.zero_grad()
        logits = model(**batch).logits
        logits.square().mean().backward()
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        return logits.detach(), {name: each.grad.clone() for name, each in trained.items()}

    logits, grads = logits_and_grads()
    fuse(model)
    fused_logits, fused_grads = logits_and_grads()
    assert not fuse_report(model).kept
    assert_same_in_double(fused_logits, logits, "logits")
    for name, grad in grads.items():
        assert_same_in_double(fused_grads[name], grad, name)
