"""Nothing is taken over that is not known to be the same computation: whatever somebody changes in a module that fused
code bypasses is followed, before `fuse` and after it, or the layer runs unfused and says so."""

import contextlib
import functools
import gc
import weakref

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import sdpa_attention
from transformers.masking_utils import sdpa_mask
from transformers.models.llama import modeling_llama

from mmpeft_fast import LoRA, add_peft, fuse, fuse_report, shipped, unfuse
from mmpeft_fast.layers import known
from mmpeft_fast.layers.class_swap import is_swapped
from mmpeft_fast.ops import csrc
from tests.closeness import assert_same_in_double
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

LINEARS = r".*\.(q|k|v|o|gate|up|down)_proj"


def lora_model(**settings):
    model = tiny_model("llama", dtype=torch.float64)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=LINEARS, **settings))
    randomize_trainable(model)
    return model.double().train()


def layers_of(model):
    return model.get_base_model().model.layers if hasattr(model, "get_base_model") else model.model.layers


def doubled(forward):
    def changed(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        return (result[0] * 2, *result[1:]) if isinstance(result, tuple) else result * 2

    return changed


def squared_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = torch.softmax((query @ key.transpose(2, 3) * scaling).square(), dim=-1) @ value
    return out.transpose(1, 2).contiguous(), None


def choose_attention(model, patch):
    patch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    AttentionInterface.register("squared", squared_attention)
    AttentionMaskInterface.register("squared", sdpa_mask)
    model.get_base_model().set_attn_implementation("squared")


def overwrite_attention(model, patch):
    patch.setitem(AttentionInterface._global_mapping, "sdpa", squared_attention)


def patch_class(kind):
    def modify(model, patch):
        patch.setattr(kind, "forward", doubled(kind.forward))

    return modify


def patch_rotation(model, patch):
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, **_: (q * cos.mean(), k))


def patch_default_attention(model, patch):
    model.get_base_model().set_attn_implementation("eager")
    plain = modeling_llama.eager_attention_forward

    def attend(*args, **kwargs):
        out, weights = plain(*args, **kwargs)
        return out * 2, weights

    patch.setattr(modeling_llama, "eager_attention_forward", attend)


def wrap(owner, name):
    """A function or method of a library, wrapped as decorators wrap."""

    def modify(model, patch):
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def scaled(*args, **kwargs):
            return plain(*args, **kwargs) * 1.25

        patch.setattr(owner, name, scaled)

    return modify


def replace(owner, name):
    def modify(model, patch):
        plain = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: plain(*args, **kwargs) * 1.25)

    return modify


def replace_operator(name):
    def modify(model, patch):
        plain = getattr(torch.Tensor, name)

        def scaled(*args):
            y = plain(*args)
            return torch.mul(y, 1.25) if y.is_floating_point() else y

        patch.setattr(torch.Tensor, name, scaled)

    return modify


def replace_repeating(model, patch):
    patch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *args: False)
    replace(sdpa_attention, "repeat_kv")(model, patch)


class Scaling(torch.Tensor):
    """Says itself what linear layers do with it, and so do all that are computed from it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs or {})
        return y * 1.25 if function is nn.functional.linear else y


def weight_of_a_subclass(model, patch):
    down = layers_of(model)[0].mlp.down_proj.base_layer
    down.weight = nn.Parameter(down.weight.detach().as_subclass(Scaling), requires_grad=False)


class HalvedMLP(modeling_llama.LlamaMLP):
    def forward(self, x):
        return super().forward(x) / 2


class PlainMLP(nn.Module):
    """No act_fn, no gate_proj."""

    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.outer(torch.relu(self.inner(x)))


def subclass_mlp(model, patch):
    layers_of(model)[0].mlp.__class__ = HalvedMLP


def replace_mlp(model, patch):
    layer = layers_of(model)[1]
    torch.manual_seed(0)
    layer.mlp = PlainMLP(layer.mlp.down_proj.out_features).double()


def function_for_activation(model, patch):
    mlp = layers_of(model)[0].mlp
    del mlp.act_fn
    mlp.act_fn = torch.tanh


def other_activation(model, patch):
    layers_of(model)[0].mlp.act_fn = nn.GELU()


def instance_forward(name):
    def modify(model, patch):
        module = layers_of(model)[0].get_submodule(name)
        kind = type(module)
        module.forward = lambda *args, **kwargs: doubled(kind.forward)(module, *args, **kwargs)

    return modify


def hook(name):
    def modify(model, patch):
        def double(module, args, output):
            return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

        layers_of(model)[0].get_submodule(name).register_forward_hook(double)

    return modify


def new_dict_of_hooks(model, patch):
    norm = layers_of(model)[0].input_layernorm
    norm._forward_hooks = type(norm._forward_hooks)()
    norm.register_forward_hook(lambda module, args, output: output * 2)


def hook_on_every_module(model, patch):
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, modeling_llama.LlamaRMSNorm) else None
    )
    patch.callback(handle.remove)


def not_causal(model, patch):
    for layer in layers_of(model):
        layer.self_attn.is_causal = False


def other_scale(model, patch):
    layers_of(model)[0].self_attn.scaling *= 3


def swapped_projections(model, patch):
    attention = layers_of(model)[0].self_attn
    attention.q_proj, attention.o_proj = attention.o_proj, attention.q_proj


def other_gain(model, patch):
    norm = layers_of(model)[0].post_attention_layernorm
    norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)


def other_epsilon(model, patch):
    layers_of(model)[0].post_attention_layernorm.variance_epsilon = 0.5


def other_adapter_scale(model, patch):
    layers_of(model)[0].self_attn.v_proj.scaling["default"] = 7.0


def dropped_adapter(model, patch):
    del layers_of(model)[0].self_attn.v_proj.lora_A["default"]


def own_dropout(model, patch):
    class Thinned(nn.Module):
        def forward(self, x):
            return x * (torch.arange(x.shape[-1]) % 2)

    layers_of(model)[0].mlp.up_proj.lora_dropout["default"] = Thinned()


def own_low_rank_layer(model, patch):
    class Squashed(nn.Linear):
        def forward(self, x):
            return torch.tanh(super().forward(x))

    layers_of(model)[0].mlp.up_proj.lora_A["default"].__class__ = Squashed


MODIFICATIONS = {
    "attention chosen by name": choose_attention,
    "attention overwritten under its name": overwrite_attention,
    "the attention of the model's own file": patch_default_attention,
    "attention's kernel wrapped": wrap(nn.functional, "scaled_dot_product_attention"),
    "attention's kernel replaced": replace(nn.functional, "scaled_dot_product_attention"),
    "a function of the chosen attention": replace_repeating,
    "the activation's function wrapped": wrap(nn.functional, "silu"),
    "the linear layers' function wrapped": wrap(nn.functional, "linear"),
    "a tensor's method replaced": replace(torch.Tensor, "pow"),
    **{f"a tensor's {name} replaced": replace_operator(name) for name in ("__mul__", "__add__", "__neg__")},
    "weight of a subclass": weight_of_a_subclass,
    "class of attention patched": patch_class(modeling_llama.LlamaAttention),
    "class of MLP patched": patch_class(modeling_llama.LlamaMLP),
    "class of layer patched": patch_class(modeling_llama.LlamaDecoderLayer),
    "class of norm patched": patch_class(modeling_llama.LlamaRMSNorm),
    "rotation patched": patch_rotation,
    "MLP of a subclass": subclass_mlp,
    "MLP of another class": replace_mlp,
    "activation as a function": function_for_activation,
    "another activation": other_activation,
    **{f"forward of {name} replaced": instance_forward(name) for name in ("self_attn", "mlp", "mlp.act_fn")},
    "forward of a LoRA layer replaced": instance_forward("mlp.up_proj"),
    "forward of its base layer replaced": instance_forward("self_attn.q_proj.base_layer"),
    **{f"hook on {name}": hook(name) for name in ("self_attn", "mlp", "input_layernorm", "mlp.up_proj.base_layer")},
    "hook on a dropout": hook("mlp.up_proj.lora_dropout.default"),
    "hooks in a new dict": new_dict_of_hooks,
    "hook on every module": hook_on_every_module,
    "attention that is not causal": not_causal,
    "another scale": other_scale,
    "projections swapped": swapped_projections,
    "another gain": other_gain,
    "another epsilon": other_epsilon,
    "another scaling of an adapter": other_adapter_scale,
    "an adapter without one of its halves": dropped_adapter,
    "a dropout of one's own": own_dropout,
    "a low-rank layer of one's own": own_low_rank_layer,
}


class Patch(contextlib.ExitStack):
    """pytest's monkeypatch as a context, and things to undo."""

    def __enter__(self):
        self._patch = self.enter_context(pytest.MonkeyPatch.context())
        self.setattr, self.setitem = self._patch.setattr, self._patch.setitem
        return super().__enter__()


@pytest.mark.parametrize("when", ["before fuse", "after fuse", "after a fused step"])
@pytest.mark.parametrize("name", MODIFICATIONS)
def test_a_changed_module_is_followed(name, when):
    batch = tiny_batch("llama", padding_side=None)
    plain = loss_and_grads(lora_model(), batch)
    with Patch() as patch:
        model = lora_model()
        MODIFICATIONS[name](model, patch)
        loss, grads = loss_and_grads(model, batch)
    assert abs(loss - plain[0]) > 1e-6, "the modification changes nothing"
    with Patch() as patch:
        model = lora_model()
        if when != "before fuse":
            fuse(model)
        if when == "after a fused step":
            loss_and_grads(model, batch)
        MODIFICATIONS[name](model, patch)
        if when == "before fuse":
            fuse(model)
        fused_loss, fused_grads = loss_and_grads(model, batch)
    assert_same_in_double(fused_loss, loss, "loss")
    assert fused_grads.keys() == grads.keys()
    for parameter, grad in grads.items():
        assert_same_in_double(fused_grads[parameter], grad, parameter)


def test_the_eager_definition_of_a_method_is_followed():
    def run(model):
        with Patch() as patch:
            replace(nn.functional, "linear")(model, patch)
            return loss_and_grads(model, batch)

    batch = tiny_batch("llama")
    model = add_peft(tiny_model("llama", dtype=torch.float64), LoRA(r=4, dropout=0.0)).train()
    (expected, grads), (loss, fused_grads) = run(model), run(fuse(model))
    assert_same_in_double(loss, expected, "loss")
    for name, grad in grads.items():
        assert_same_in_double(fused_grads[name], grad, name)


def test_a_modification_that_is_taken_back_is_fused_again():
    model, batch = fuse(lora_model()), tiny_batch("llama")
    expected, _ = loss_and_grads(model, batch)
    with Patch() as patch:
        patch_class(modeling_llama.LlamaMLP)(model, patch)
        assert len(fuse_report(model).kept) == 2
        loss_and_grads(model, batch)
    assert not fuse_report(model).kept
    assert torch.equal(loss_and_grads(model, batch)[0], expected)


@pytest.mark.parametrize("is_causal", [False, True, None])
def test_arguments_that_attention_reads(is_causal):
    batch = tiny_batch("llama", padding_side=None) | {"is_causal": is_causal}
    del batch["attention_mask"]
    model = lora_model()
    expected = loss_and_grads(model, batch)
    got = loss_and_grads(fuse(model), batch)
    assert_same_in_double(got[0], expected[0], "loss")


@pytest.mark.parametrize("training", [True, False])
def test_dropouts_follow_their_own_mode(training):
    """Monte-Carlo dropout, and dropout switched off while training."""
    model, batch = lora_model(lora_dropout=0.5), tiny_batch("llama")
    model.train(training)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropouts
    for dropout in dropouts:
        dropout.train(not training)
    if training:  # nothing is dropped
        expected = loss_and_grads(model, batch)
        got = loss_and_grads(fuse(model), batch)
        assert_same_in_double(got[0], expected[0], "loss")
    else:
        fuse(model)
        assert not torch.equal(model(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("config", [LoraConfig, IA3Config, LNTuningConfig])
def test_merged_adapters_and_a_pass_without_them(config):
    """A preference loss's reference: `disable_adapter` on a merged model."""
    settings = {"target_modules": LINEARS}
    if config is IA3Config:
        settings["feedforward_modules"] = r".*\.down_proj"
    if config is LNTuningConfig:
        settings["target_modules"] = r".*layernorm"
    batch = tiny_batch("llama")

    def reference(is_fused):
        model = get_peft_model(tiny_model("llama", dtype=torch.float64), config(**settings))
        randomize_trainable(model)
        model.double().eval()
        if is_fused:
            fuse(model)
        losses = [model(**batch).loss]
        model.merge_adapter()
        losses.append(model(**batch).loss)
        with model.disable_adapter():
            losses.append(model(**batch).loss)
        return [*losses, model(**batch).loss]

    for got, expected in zip(reference(True), reference(False), strict=True):
        assert_same_in_double(got, expected)


def test_hooks_that_record_hidden_states_leave_layers_fused():
    """transformers leaves them on layers and attentions for good."""
    model, batch = fuse(lora_model()), tiny_batch("llama")
    expected = unfuse(lora_model())(**batch, output_hidden_states=True).hidden_states
    got = model(**batch, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) and layers_of(model)[0].self_attn._forward_hooks
    for ours, theirs in zip(got, expected, strict=True):
        assert_same_in_double(ours, theirs)
    assert not fuse_report(model).kept


@pytest.mark.parametrize("labels", ["few", "all"])
def test_eager_attention_with_padding_on_the_left(labels):
    """Its mask is a large negative number, so that a padding row attends to every position alike."""
    batch = tiny_batch("llama", padding_side="left")
    if labels == "all":
        batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    add_peft(model, LoRA(r=4, dropout=0.0))
    randomize_trainable(model)
    model.train()
    expected = loss_and_grads(model, batch)
    got = loss_and_grads(fuse(model), batch)
    torch.testing.assert_close(got[0], expected[0])
    for name, grad in expected[1].items():
        difference = torch.linalg.vector_norm(got[1][name] - grad) / torch.linalg.vector_norm(grad)
        # A row whose scores are absorbed by the mask leaves rounding of the whole sum in either computation.
        assert difference < 1e-3, name


def test_a_model_is_freed_without_a_collection():
    gc.disable()
    try:
        model = fuse(lora_model())
        loss_and_grads(model, tiny_batch("llama"))
        layer = weakref.ref(layers_of(model)[0])
        weight = weakref.ref(layers_of(model)[0].mlp.up_proj.base_layer.weight)
        del model
        assert layer() is None and weight() is None
    finally:
        gc.enable()


def test_a_cycle_through_a_layer_is_collected():
    model = fuse(lora_model())
    loss_and_grads(model, tiny_batch("llama"))
    layer = layers_of(model)[0]
    layer.mlp.owner = [layer]
    loss_and_grads(model, tiny_batch("llama"))
    gone = weakref.ref(layer)
    del model, layer
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(csrc.why_unavailable() is not None, reason="the native extension is not built")
def test_an_unchanged_layer_is_not_read_again(monkeypatch):
    model, batch = fuse(lora_model()), tiny_batch("llama")
    loss_and_grads(model, batch)
    monkeypatch.setattr("mmpeft_fast.layers.reading.read_layer", lambda *_: pytest.fail("read again"))
    loss_and_grads(model, batch)
    assert all(map(is_swapped, layers_of(model)))


def test_everything_that_is_installed_is_known():
    """Where this fails: `python -m mmpeft_fast.shipped`, and commit the table if all other tests pass."""
    assert not shipped.missing(known.table(), shipped.learn())


def test_what_a_function_says_decides():
    """The same words are known in any class, others in none."""

    class Same(nn.Module):
        def forward(self, hidden_states):
            "Words that change nothing."
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(2).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)

    class Other(Same):
        def forward(self, hidden_states):
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(2).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return (1 + self.weight) * hidden_states.to(input_dtype)

    class Called(Same):
        def __call__(self, hidden_states):
            return super().__call__(hidden_states) + 1

    assert known.why_unknown(Same, "rms_norm") is None
    assert "not one that is known" in known.why_unknown(Other, "rms_norm")
    assert "__call__" in known.why_unknown(Called, "rms_norm")
    assert "not one that is known" in known.why_unknown(Same, "mlp")
