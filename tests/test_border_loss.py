"""The loss is taken over only where the model's own would be the same: whatever is changed about labels, arguments,
loss, head, model or layers is followed, before `fuse` and after it."""

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.loss import loss_utils

from mmpeft_fast import LoRA, add_peft, fuse, fuse_report, unfuse
from mmpeft_fast.models import empty_model
from tests.closeness import assert_as_close_as_eager, assert_same_in_double
from tests.tiny_models import loss_and_grads, materialize_fake, randomize_trainable, tiny_batch, tiny_model


def lora(family="llama", *, dtype=torch.float32, num_layers=2):
    model = add_peft(tiny_model(family, num_layers=num_layers, dtype=dtype), LoRA(r=4, dropout=0.0))
    randomize_trainable(model)
    return model.to(dtype).train()


def batch_of(**changes):
    batch = tiny_batch("llama") | changes
    return {name: value for name, value in batch.items() if value is not None}


def outcome(model, batch):
    """Loss and gradients, or the error."""
    try:
        return loss_and_grads(model, batch)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        return type(error), {}


def assert_same(fused, eager, truth):
    """Losses and gradients; truth: the unfused ones of a float64 model."""
    if isinstance(eager[0], type):
        assert isinstance(fused[0], type), f"unfused raises {eager[0]}"
        return
    assert not isinstance(fused[0], type), f"fused raises {fused[0]}"
    assert fused[0].isnan() == eager[0].isnan() and fused[0].isinf() == eager[0].isinf()
    if eager[0].isfinite():
        assert_as_close_as_eager(fused[0], eager[0], truth[0], "loss")
    assert fused[1].keys() == eager[1].keys()
    for name, grad in eager[1].items():
        if grad.isfinite().all():
            assert_as_close_as_eager(fused[1][name], grad, truth[1][name], name)
        else:
            assert not fused[1][name].isfinite().all(), name


def wide(batch):
    return {name: value.double() if name == "pixel_values" else value for name, value in batch.items()}


def assert_fusing_changes_nothing(build, batch, run=outcome):
    """build: dtype -> model."""
    fused = run(fuse(build(torch.float32)), batch)
    assert_same(fused, run(build(torch.float32), batch), run(build(torch.float64), wide(batch)))


def shifted(labels, by=1):
    return nn.functional.pad(labels[:, by:], (0, by), value=-100)


def random_labels(batch, seed=3):
    labels = torch.randint(30, 60, batch["labels"].shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(batch["labels"] == -100, -100, labels)


PLAIN = tiny_batch("llama")
NONE_SUPERVISED = torch.full_like(PLAIN["labels"], -100)
PACKED = torch.cat([torch.arange(12), torch.arange(18)]).expand(3, 30)

BATCHES = {
    "shift_labels": batch_of(shift_labels=shifted(random_labels(PLAIN))),
    "shift_labels without a meaning": batch_of(shift_labels=None),
    "ignore_index": batch_of(labels=PLAIN["labels"].clamp(min=0), ignore_index=0),
    "a keyword of nobody's": batch_of(label_smoothing=0.1),
    "count as an int": batch_of(num_items_in_batch=7),
    "count as a tensor": batch_of(num_items_in_batch=torch.tensor(7)),
    "count as a tensor of one element": batch_of(num_items_in_batch=torch.tensor([7])),
    "count of zero": batch_of(num_items_in_batch=torch.tensor(0)),
    "several counts": batch_of(num_items_in_batch=torch.tensor([7, 8])),
    "nothing supervised": batch_of(labels=NONE_SUPERVISED),
    "nothing supervised, a count": batch_of(labels=NONE_SUPERVISED, num_items_in_batch=torch.tensor(7)),
    "nothing supervised, a count of zero": batch_of(labels=NONE_SUPERVISED, num_items_in_batch=0),
    "labels of no length": batch_of(labels=torch.zeros(3, 0, dtype=torch.long)),
    "labels that are too short": batch_of(labels=PLAIN["labels"][:, -20:]),
    "labels of three columns": batch_of(labels=PLAIN["labels"][:, -3:]),
    "labels of one sample": batch_of(labels=PLAIN["labels"][:1]),
    "labels as a flat list": batch_of(labels=PLAIN["labels"].flatten()),
    "labels of int32": batch_of(labels=PLAIN["labels"].int()),
    "labels beyond the vocabulary": batch_of(labels=torch.where(PLAIN["labels"] == -100, -100, 1000)),
    "use_cache": batch_of(use_cache=True),
    "logits_to_keep": batch_of(logits_to_keep=10),
    "hidden states": batch_of(output_hidden_states=True),
    "positions that jump": batch_of(attention_mask=None, position_ids=PACKED),
    "positions that jump, no cache": batch_of(attention_mask=None, position_ids=PACKED, use_cache=False),
    "positions that jump, a cache": batch_of(attention_mask=None, position_ids=PACKED, use_cache=True),
    "positions that jump and a mask": batch_of(position_ids=PACKED),
    "no mask": batch_of(attention_mask=None),
    "a mask of four dimensions": batch_of(attention_mask=torch.ones(3, 1, 30, 30, dtype=torch.bool).tril(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_arguments_are_followed(name):
    assert_fusing_changes_nothing(lambda dtype: lora(dtype=dtype), BATCHES[name])


def half_loss(logits, labels, vocab_size, **kwargs):
    return loss_utils.ForCausalLMLoss(logits, labels, vocab_size, **kwargs) / 2


def set_loss(model, patch):
    model.loss_function = half_loss


def loss_of_class(model, patch):
    patch.setattr(type(model), "loss_function", property(lambda self: half_loss))


def loss_by_name(model, patch):
    patch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", half_loss)


def patched_inner_loss(model, patch):
    plain = loss_utils.fixed_cross_entropy
    patch.setattr(loss_utils, "fixed_cross_entropy", lambda *args, **kwargs: plain(*args, **kwargs) / 2)


def patched_cross_entropy(model, patch):
    plain = nn.functional.cross_entropy
    patch.setattr(nn.functional, "cross_entropy", lambda *args, **kwargs: plain(*args, **kwargs) / 2)


def double_loss(forward):
    def changed(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.loss = out.loss + out.logits.square().mean()
        return out

    return changed


def patched_class(model, patch):
    kind = next(kind for kind in type(model).__mro__ if kind.__module__.endswith("modeling_llama"))
    kind = getattr(type(model), "_swapped_from", kind)
    patch.setattr(kind, "forward", double_loss(kind.forward))


def patched_instance(model, patch):
    model.forward = types.MethodType(double_loss(type(model).forward), model)


def hook_on(path):
    def modify(model, patch):
        def turn(module, args, output):
            stream = output if isinstance(output, torch.Tensor) else output[0]
            result = stream.cumsum(1)
            if isinstance(output, torch.Tensor):
                return result
            output.last_hidden_state = result
            return output

        model.get_submodule(path).register_forward_hook(turn)

    return modify


class RolledHead(nn.Linear):
    def forward(self, x):
        return super().forward(x).roll(1, dims=1)


def other_head(model, patch):
    model.lm_head.__class__ = RolledHead


def wider_head(model, patch):
    torch.manual_seed(1)
    model.lm_head = nn.Linear(model.lm_head.in_features, 90, bias=False).double()


def rolled_norm(model, patch):
    norm, plain = model.model.norm, type(model.model.norm).forward
    norm.forward = lambda x: plain(norm, x).cumsum(1)


def patched_mask(model, patch):
    from transformers.models.llama import modeling_llama

    def bidirectional(config, inputs_embeds, **_):
        length = inputs_embeds.shape[1]
        return torch.ones(len(inputs_embeds), 1, length, length, dtype=torch.bool)

    patch.setattr(modeling_llama, "create_causal_mask", bidirectional)


def dropped_layer(model, patch):
    model.model.layers = model.model.layers[:-1]
    model.config.num_hidden_layers -= 1


def dropped_without_a_word(model, patch):
    del model.model.layers[-1]


def fewer_by_configuration(model, patch):
    model.config.num_hidden_layers -= 1


def reversed_layers(model, patch):
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


def repeated_layers(model, patch):
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers += 1


def no_return_dict(model, patch):
    model.config.return_dict = False


MODIFICATIONS = {
    "loss of an instance": set_loss,
    "loss of a class": loss_of_class,
    "loss under its name": loss_by_name,
    "what the loss calls": patched_inner_loss,
    "what torch has for it": patched_cross_entropy,
    "forward of the class": patched_class,
    "forward of the instance": patched_instance,
    **{f"hook on {path}": hook_on(path) for path in ("lm_head", "model", "model.norm", "model.layers.1")},
    "another head": other_head,
    "a head that is too wide": wider_head,
    "another norm": rolled_norm,
    "another mask": patched_mask,
    "a layer less": dropped_layer,
    "a layer less, not in the configuration": dropped_without_a_word,
    "a layer less by configuration": fewer_by_configuration,
    "layers in another order": reversed_layers,
    "a layer twice": repeated_layers,
}


@pytest.mark.filterwarnings("ignore:fuse:UserWarning")
@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
@pytest.mark.parametrize("name", MODIFICATIONS)
def test_modifications_are_followed(name, when):
    batch = batch_of(use_cache=False)

    def run(dtype, *, is_fused=False):
        with pytest.MonkeyPatch.context() as patch:
            model = lora(dtype=dtype)
            if is_fused and when == "after fuse":
                loss_and_grads(fuse(model), batch)
            MODIFICATIONS[name](model, patch)
            if is_fused and when == "before fuse":
                fuse(model)
            return outcome(model, batch)

    eager = run(torch.float32)
    changes = isinstance(eager[0], type) or abs(eager[0] - outcome(lora(), batch)[0]) > 1e-6
    assert changes, "the modification changes nothing"
    assert_same(run(torch.float32, is_fused=True), eager, run(torch.float64))


@pytest.mark.parametrize(
    "name", ["loss of an instance", "loss of a class", "forward of the instance", "another head", "hook on lm_head"]
)
def test_the_report_names_what_is_not_known(name):
    with pytest.MonkeyPatch.context() as patch:
        model = fuse(lora())
        assert not fuse_report(model).kept
        MODIFICATIONS[name](model, patch)
        assert list(fuse_report(model).kept) == ["LlamaForCausalLM"]
        assert model(**tiny_batch("llama")).logits is not None
    with pytest.MonkeyPatch.context() as patch:
        model = lora()
        MODIFICATIONS[name](model, patch)
        with pytest.warns(UserWarning, match="LlamaForCausalLM: "):
            fuse(model)


class OwnLoss(type(tiny_model("llama"))):
    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        out.loss = out.logits.square().mean()
        return out


@pytest.mark.filterwarnings("ignore:fuse:UserWarning")
def test_a_subclass_with_a_loss_of_its_own():
    def build(dtype):
        model = lora(dtype=dtype)
        model.__class__ = OwnLoss
        return model

    assert_fusing_changes_nothing(build, PLAIN)


def test_a_tuple_is_returned_where_one_is_asked_for():
    batch = PLAIN | {"return_dict": False}
    model = lora(dtype=torch.float64)
    expected = model(**batch)
    got = fuse(model)(**batch)
    assert type(got) is type(expected) is tuple and len(got) == len(expected)
    assert_same_in_double(got[0], expected[0])
    assert_same_in_double(got[1], expected[1])


@pytest.mark.parametrize("source", ["call", "configuration"])
def test_hidden_states_of_padding_are_kept(source):
    batch = PLAIN | ({"output_hidden_states": True} if source == "call" else {})
    model = lora(dtype=torch.float64)
    model.config.output_hidden_states = source == "configuration"
    expected = model(**batch).hidden_states
    got = fuse(model)(**batch).hidden_states
    for ours, theirs in zip(got, expected, strict=True):
        assert_same_in_double(ours, theirs)


def test_a_hook_on_an_earlier_layer_sees_padding():
    def seen(model):
        states = []
        model.model.layers[0].register_forward_hook(lambda module, args, output: states.append(output))
        model.model.layers[1].register_forward_pre_hook(lambda module, args: states.append(args[0]))
        model(**PLAIN)
        return states

    models = lora(dtype=torch.float64), fuse(lora(dtype=torch.float64))
    for theirs, ours in zip(*map(seen, models), strict=True):
        assert_same_in_double(ours, theirs)


def test_padding_is_kept_in_the_cache():
    expected = lora(dtype=torch.float64)(**PLAIN, use_cache=True).past_key_values
    got = fuse(lora(dtype=torch.float64))(**PLAIN, use_cache=True).past_key_values
    assert got.get_seq_length() == expected.get_seq_length() == 30
    for ours, theirs in zip(got.layers, expected.layers, strict=True):
        assert_same_in_double(ours.keys, theirs.keys)
        assert_same_in_double(ours.values, theirs.values)


@pytest.mark.parametrize("capacity", [0, -1, 2.0, "4", True])
def test_a_capacity_that_is_none(capacity):
    with pytest.raises(ValueError, match="supervised_capacity to be a positive integer"):
        fuse(lora())(**PLAIN, supervised_capacity=capacity)


def test_a_capacity_that_is_too_small():
    model = fuse(lora(dtype=torch.float64))
    most = int((PLAIN["labels"][:, 1:] != -100).sum(1).max())
    expected = model(**PLAIN).loss
    for capacity in (most, most + 1, 1000):
        assert_same_in_double(model(**PLAIN, supervised_capacity=capacity).loss, expected)
    with pytest.raises(ValueError, match=f"supervised_capacity of at least {most}, got {most - 1}"):
        model(**PLAIN, supervised_capacity=most - 1)


def test_labels_of_fake_tensors():
    model = add_peft(empty_model(tiny_model("llama").config, dtype=torch.float32), LoRA(r=4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize_fake(model)
        fuse(model).train()
        loss, grads = loss_and_grads(model, tiny_batch_of_zeros())
        assert loss.shape == () and grads


def tiny_batch_of_zeros():
    ids = torch.zeros(2, 9, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "qwen_vl"])
def test_every_kind_of_model_takes_the_tail(family, monkeypatch):
    """Few rows reach the head, and the loss is the same."""
    batch, rows = tiny_batch(family), []

    def build(dtype):
        return lora(family, dtype=dtype)

    assert_fusing_changes_nothing(build, batch)
    model = fuse(build(torch.float32))
    tail = type(model)._head_loss

    def noted(self, hidden, *rest):
        rows.append(hidden.shape[0])
        return tail(self, hidden, *rest)

    monkeypatch.setattr(type(model), "_head_loss", noted)
    model(**batch)
    assert rows == [3 * 5] and not fuse_report(model).kept


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]}])
def test_a_head_that_hf_peft_trains(settings):
    def build(dtype):
        config = LoraConfig(r=2, **({"target_modules": ["q_proj"]} | settings))
        model = get_peft_model(tiny_model("llama", dtype=dtype), config)
        randomize_trainable(model)
        return model.to(dtype).train()

    assert_fusing_changes_nothing(build, PLAIN)
    assert fuse(build(torch.float32))(**PLAIN).logits is None


def test_accelerates_autocast_around_a_fused_model_changes_nothing():
    from accelerate.utils import convert_outputs_to_fp32

    model = fuse(lora())
    wrapped = torch.autocast("cpu", torch.bfloat16)(type(model).forward)
    model.forward = types.MethodType(convert_outputs_to_fp32(wrapped), model)
    assert not fuse_report(model).kept
    assert model(**PLAIN).logits is None


def test_what_unfuse_leaves_is_the_models_own():
    model = unfuse(fuse(lora()))
    assert torch.equal(model(**PLAIN).logits, lora()(**PLAIN).logits)


def test_a_decoder_that_is_not_known_is_named_in_the_report(monkeypatch):
    model, batch = fuse(lora()), batch_of()
    assert fuse_report(model).tail is None
    expected, _ = loss_and_grads(model, batch)
    kind = type(model.model)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    report = fuse_report(model)
    assert not report.kept
    assert "the last layer runs at every position: the forward of transformers.models.llama" in str(report)
    loss, _ = loss_and_grads(model, batch)
    assert abs(loss - expected) < 1e-5
