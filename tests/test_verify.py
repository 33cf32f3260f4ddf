"""The comparison of a fused model with itself unfused: it agrees where nothing is wrong, finds and names what is, and
leaves no trace."""

import copy
import random
import warnings

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from mmpeft_fast import (
    FuseCallback,
    LoRA,
    add_peft,
    as_unfused,
    compare,
    fuse,
    fuse_report,
    is_fused,
    study_method,
    unfuse,
)
from mmpeft_fast.layers import causal_lm, decoder
from mmpeft_fast.layers.class_swap import is_swapped
from mmpeft_fast.models import FAMILIES, empty_model
from mmpeft_fast.small_batches import cut_batch, documents_batch, made_batches
from mmpeft_fast.verify import _Run
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

LINEARS = r".*\.(q|k|v|o|gate|up|down)_proj"
METHODS = ("lora", "ia3", "adapter", "prefix", "layernorm")
PEFT_CONFIGS = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=LINEARS, lora_dropout=0.3),
    "IA3": lambda: IA3Config(target_modules=LINEARS, feedforward_modules=r".*\.down_proj"),
    "LN-tuning": lambda: LNTuningConfig(target_modules=r".*layernorm|.*\.norm"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "projected prefix": lambda: PrefixTuningConfig(
        num_virtual_tokens=4, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=32
    ),
}


def own_model(family="llama", method="lora", *, dtype=torch.float32, seed=0, **settings):
    model = tiny_model(family, dtype=dtype, seed=seed)
    add_peft(model, study_method(model, method, **settings))
    randomize_trainable(model)
    return model.train()


def peft_model(name="LoRA", *, dtype=torch.float32, seed=0):
    model = get_peft_model(tiny_model("llama", dtype=dtype, seed=seed), PEFT_CONFIGS[name]())
    randomize_trainable(model)
    return model.train()


def assert_agrees(comparison):
    assert not comparison.differing, str(comparison)
    assert comparison.rows


# Every family, and every method; tests/test_properties.py combines them at random.
CASES = [("llama", method) for method in METHODS] + [
    (family, METHODS[i % len(METHODS)]) for i, family in enumerate(FAMILIES) if family != "llama"
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_healthy_models_agree(family, method):
    """Its own batches, padded on both sides and with an image where the model takes one."""
    model = fuse(own_model(family, method, dtype=torch.bfloat16), strict=True, verify=True)
    report = fuse_report(model)
    assert not report.kept
    assert "agree" in report.verified, report.verified


@pytest.mark.parametrize("name", PEFT_CONFIGS)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_healthy_models_of_hf_peft_agree(name):
    model = fuse(peft_model(name), strict=True)
    assert_agrees(compare(model))
    assert_agrees(compare(model, tiny_batch("llama", padding_side="left")))


@pytest.mark.parametrize("seed", range(6))
def test_no_false_alarm_in_bfloat16(seed):
    make, family = ((peft_model, "llama"), (lambda **options: own_model("qwen2", **options), "qwen2"))[seed % 2]
    model = fuse(make(dtype=torch.bfloat16, seed=seed))
    for side in ("left", "right"):
        assert_agrees(compare(model, tiny_batch(family, padding_side=side, seed=seed)))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def scale_a_gradient(patch):
    """Of up's low-rank branch, in the first layer alone."""
    plain = decoder.fused_linear

    def fused_linear(x, segments, **options):
        if options.get("stream") == 2 and segments[0].weight is MARKED[0]:
            gate, up = segments
            branch = up.branches[0]._replace(up=_Scaled.apply(up.branches[0].up))
            segments = [gate, up._replace(branches=(branch,))]
        return plain(x, segments, **options)

    patch.setattr(decoder, "fused_linear", fused_linear)


def scale_an_input_gradient(patch):
    plain = decoder.FusedDecoderLayer._attend

    def attend(self, raw, *args):
        q, k, v = raw
        return plain(self, (q, k, _Scaled.apply(v) if self.cache_idx == 1 else v), *args)

    patch.setattr(decoder.FusedDecoderLayer, "_attend", attend)


def wrong_rotation(patch):
    plain = decoder.FusedDecoderLayer._attend

    def attend(self, raw, scales, norms, inputs, *args):
        sin = -inputs.sin if self.cache_idx == 1 else inputs.sin
        return plain(self, raw, scales, norms, inputs._replace(sin=sin), *args)

    patch.setattr(decoder.FusedDecoderLayer, "_attend", attend)


def wrong_activation(patch):
    plain = decoder.fused_linear

    def fused_linear(x, segments, **options):
        return plain((x[0], x[1] * 1.001) if options.get("prologue") == "swiglu" else x, segments, **options)

    patch.setattr(decoder, "fused_linear", fused_linear)


def dropped_mask(patch):
    patch.setattr(decoder, "full_mask", lambda mask, num_queries: None)


def mask_taken_for_needless(patch):
    patch.setattr(causal_lm, "causality_suffices", lambda *args: True)


def other_loss(patch):
    plain = causal_lm.linear_cross_entropy
    patch.setattr(causal_lm, "linear_cross_entropy", lambda *args, **options: plain(*args, **options) * 1.001)


def wrong_final_norm(patch):
    plain = decoder.rms_norm
    patch.setattr(decoder, "rms_norm", lambda x, gain, eps: plain(x, gain, eps) * 1.001)


MARKED = []  # the weight of the first layer's gate
FAULTS = {
    "gradient": (scale_a_gradient, {"model.layers.0": "mlp: gradient of mlp.up_proj.branches.0.up"}),
    "gradient of v": (scale_an_input_gradient, {"model.layers.1": "attention: gradient of the input"}),
    "rotation": (wrong_rotation, {"model.layers.1": "attention: output"}),
    "mask": (dropped_mask, {"model.layers.0": "attention: output", "model.layers.1": "attention: output"}),
    "padding": (
        mask_taken_for_needless,
        {"model.layers.0": "attention: output", "model.layers.1": "attention: output"},
    ),
    "activation": (wrong_activation, {"model.layers.0": "mlp: output", "model.layers.1": "mlp: output"}),
    "loss": (other_loss, {"LlamaForCausalLM": "head and loss: "}),
    "norm": (wrong_final_norm, {"model.norm": "norm: "}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_named_and_unfused(name):
    break_it, expected = FAULTS[name]
    batch = tiny_batch("llama", padding_side="left")
    truth = loss_and_grads(own_model(dropout=0.0), batch)
    model = own_model(dropout=0.0)
    MARKED[:] = [model.model.layers[0].mlp.gate_proj.weight]
    with pytest.MonkeyPatch.context() as patch:
        break_it(patch)
        with pytest.warns(UserWarning, match="computed something else"):
            fuse(model, verify=True)
        kept = fuse_report(model).kept
        assert kept.keys() == expected.keys()
        for layer, what in expected.items():
            assert kept[layer].startswith(f"verify: {what}"), kept[layer]
            assert "of allowed" in kept[layer]
        assert is_fused(model), "the rest stays fused"
        with warnings.catch_warnings():  # it stays out until unfuse
            warnings.simplefilter("ignore")
            assert fuse_report(fuse(model)).kept == kept
        got = loss_and_grads(model, batch)
    torch.testing.assert_close(got[0], truth[0], rtol=1e-5, atol=1e-6)
    for parameter, grad in truth[1].items():
        torch.testing.assert_close(got[1][parameter], grad, rtol=1e-3, atol=1e-6)
    assert not fuse_report(fuse(unfuse(model), verify=True)).kept


def test_strict_makes_a_difference_an_error():
    model = own_model()
    with pytest.MonkeyPatch.context() as patch:
        wrong_rotation(patch)
        with pytest.raises(ValueError, match=r"model.layers.1, .* of allowed"):
            fuse(model, strict=True, verify=True)
    assert not is_fused(model)


def test_layers_that_see_a_prefix_of_hf_peft_are_unfused_together():
    model = peft_model("prefix")
    batch = tiny_batch("llama")
    expected = model(**batch).loss
    with pytest.MonkeyPatch.context() as patch:
        wrong_rotation(patch)
        with pytest.warns(UserWarning, match="computed something else"):
            fuse(model, verify=True)
        torch.testing.assert_close(model(**batch).loss, expected)
    assert not is_fused(model)


def test_the_table_names_every_layer_and_what_differs():
    model = fuse(own_model())
    table = str(compare(model))
    for name in ("model.layers.0", "model.layers.1", "model.norm", "LlamaForCausalLM", "attention", "mlp", "agrees"):
        assert name in table
    with pytest.MonkeyPatch.context() as patch:
        wrong_rotation(patch)
        comparison = compare(model)
    assert {row.layer for row in comparison.differing} == {"model.layers.1"}
    assert "DIFFERS" in str(comparison)
    layer = model.model.layers[0]
    layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuse(unfuse(model))
    assert "not fused" in str(compare(model))


def traces(model):
    """Everything that a comparison must leave as it is."""
    modules = list(model.modules())
    entries = [
        {name: dict(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()}
        for module in modules
    ]
    generators = torch.get_rng_state().tolist(), random.getstate()
    buffers = [buffer.clone() for buffer in model.buffers()]
    return entries, [type(module) for module in modules], generators, buffers


@pytest.mark.parametrize(
    ("family", "training"), [("llama", True), ("llama", False), ("qwen2_vl", True), ("llava", False)]
)
def test_nothing_is_left_behind(family, training):
    """After a first step, and before any: attributes, hooks, modes, gradients, generators, classes."""
    batch = tiny_batch(family)
    for is_first in (True, False):
        model = fuse(own_model(family, "lora"))
        if not is_first:
            loss_and_grads(model, batch)
        model.train(training)
        values = copy.deepcopy(model.state_dict())
        model.register_forward_hook(lambda *_: None)
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        before = traces(model)
        compare(model)
        after = traces(model)
        assert before[1:3] == after[1:3]
        for was, now in zip(before[0], after[0], strict=True):
            assert was.keys() == now.keys()
            assert all(now[name] is value or type(value) is dict for name, value in was.items() if name != "reading")
            assert all(now[name].keys() == value.keys() for name, value in was.items() if type(value) is dict)
        assert all(torch.equal(was, now) for was, now in zip(before[3], after[3], strict=True))
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in values.items())
        assert all(parameter.grad is grads[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("make", [lambda: own_model(dropout=0.5), peft_model])
def test_dropout_is_left_out_and_draws_nothing(make):
    """The masks of a step are the same with a comparison before it and without."""
    losses = []
    for verify in (False, True):
        model, batch = make(), tiny_batch("llama")
        torch.manual_seed(3)
        fuse(model, verify=verify)
        losses.append([model(**batch).loss, model(**batch).loss])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_as_unfused_runs_the_models_own_computation():
    model, batch = own_model(dropout=0.0), tiny_batch("llama")
    expected = model(**batch)
    fuse(model)
    with as_unfused(model):
        got = model(**batch)
        assert not any(map(is_swapped, model.modules()))
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.logits, expected.logits)
    assert model(**batch).logits is None


def test_checkpointing_and_autocast_are_no_hindrance():
    model = fuse(peft_model())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert_agrees(compare(model))


def test_a_frozen_model_is_compared_too():
    model = tiny_model("llama").requires_grad_(False)
    assert_agrees(compare(fuse(model)))


def test_what_cannot_be_compared_is_said_and_stays_fused():
    config = FAMILIES["llama"].tiny_config(60, lambda text: 0)
    model = fuse(add_peft(empty_model(config), LoRA(r=4)), verify=True)
    assert is_fused(model)
    assert "against the unfused model: not compared: its tensors have no values" in str(fuse_report(model))
    model = fuse(own_model(), verify={"input_ids": torch.ones(1, 4, dtype=torch.long)})
    assert is_fused(model)
    assert "expected a batch with labels" in str(fuse_report(model))
    with pytest.raises(ValueError, match="expected a fused model"):
        compare(own_model(), tiny_batch("llama"))


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl", "llava_next", "qwen_vl"])
def test_a_cut_batch_is_small_and_whole(family):
    batch = tiny_batch(family)
    cut = cut_batch(batch | {"supervised_capacity": 9, "right_padded": True})
    assert "supervised_capacity" not in cut
    assert cut["right_padded"]
    if family == "llama":
        assert cut["input_ids"].shape[1] <= 24
    assert len(cut["input_ids"]) == (2 if family == "llama" else 1)
    assert (cut["labels"] != -100).any()
    assert_agrees(compare(fuse(own_model(family)), cut))


def test_made_batches_are_the_same_every_time():
    config = own_model("llava").config
    for one, other in zip(made_batches(config, torch.float32), made_batches(config, torch.float32), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("break_it", [None, wrong_rotation])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.filterwarnings("ignore:.*use_cpu.*")
def test_the_callback_compares_the_first_batch(break_it, bf16, tmp_path):
    batch = tiny_batch("llama", batch_size=2)
    data = [{name: value[i] for name, value in batch.items()} for i in range(2)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, bf16=bf16, dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    model = own_model(dropout=0.0)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[FuseCallback()])
    assert fuse_report(model).verified is None
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if break_it is not None:
            break_it(patch)
        trainer.train()
    report = fuse_report(model)
    assert set(report.kept) == (set() if break_it is None else {"model.layers.1"})
    assert report.verified is not None and not report.verified.startswith("not compared")
    assert not model._forward_pre_hooks


def test_a_lost_gradient_is_found():
    """A part of a tower that runs without a graph behind a trained one."""
    model = own_model("qwen2_vl")
    blocks = model.model.visual.blocks
    blocks[0].requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuse(model, verify=True)
    batch = tiny_batch("qwen2_vl")
    _, grads = loss_and_grads(model, batch)
    assert any("visual.blocks.0" in name for name in grads)


def test_what_differs_by_chance_is_looked_at_again(monkeypatch):
    model = fuse(own_model())
    own = _Run.rows
    looks = []

    def differing(shares):
        """Every look's first row as far off as the look says, in what is allowed."""

        def rows(run):
            looks.append(run.look)
            first, *others = own(run)
            return [first._replace(difference=shares[run.look] * first.allowed), *others]

        return rows

    for shares, expected, differs in (
        ([0.5], [0], False),
        ([1.5, 0.5], [0, 1], False),
        ([1.5, 1.2, 2.0, 1.1], [0, 1, 2, 3], True),
        ([100.0], [0], True),
        ([float("nan")], [0], True),
    ):
        looks.clear()
        monkeypatch.setattr(_Run, "rows", differing(shares))
        assert bool(compare(model, documents_batch(model.config)).differing) == differs
        assert looks == expected


def test_another_look_has_other_values():
    model = fuse(own_model())
    batch = documents_batch(model.config)
    first, again = ({row[:3]: row for row in _Run(model, batch, look).rows()} for look in (0, 1))
    assert first.keys() == again.keys()
    assert sum(first[key].difference != again[key].difference for key in first) > len(first) // 2
