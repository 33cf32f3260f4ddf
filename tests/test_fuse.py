"""What a fused model is besides fast: the same parameters, the same tree, the same behaviour around it."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmpeft_fast import LoRA, add_peft, fuse, is_fused, make_method, unfuse
from mmpeft_fast.layers.causal_lm import causality_suffices, supervised_targets
from mmpeft_fast.layers.class_swap import is_swapped
from mmpeft_fast.measure import saved_bytes
from mmpeft_fast.models import FAMILIES, empty_model
from mmpeft_fast.stored.baseline import add_baseline
from tests.test_parity import METHODS, prepared
from tests.tiny_models import (
    first_text_token,
    loss_and_grads,
    materialize_fake,
    randomize_trainable,
    tiny_batch,
    tiny_model,
    token_id,
)


def generate(model, batch, **options):
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        return model.eval().generate(
            **prompt,
            max_new_tokens=6,
            do_sample=False,
            suppress_tokens=list(range(first_text_token())),
            pad_token_id=token_id("<pad>"),
            eos_token_id=None,
            **options,
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "prefix", "layernorm-simp"])
def test_generation(family, method):
    model = prepared(family, method)
    batch = tiny_batch(family, padding_side="left")
    if method == "prefix" and family in ("llava", "llava_next"):  # HF PEFT does not prefill images behind its cache
        model = randomized(add_peft(tiny_model(family), make_method("prefix", num_virtual_tokens=5)))
    eager = generate(model, batch)
    fused = generate(fuse(model), batch)
    assert torch.equal(eager, fused)
    if (method, family) != ("prefix", "llama"):  # which HF PEFT's prefix fails on without a cache
        assert torch.equal(eager, generate(model, batch, use_cache=False))


def randomized(model):
    randomize_trainable(model)
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_gradient_checkpointing(family, use_reentrant):
    model = fuse(add_peft(tiny_model(family), LoRA(r=4, alpha=8, dropout=0.3), train_connector=True)).train()
    randomize_trainable(model)
    batch = tiny_batch(family)
    torch.manual_seed(0)
    loss, grads = loss_and_grads(model, batch)
    torch.manual_seed(0)
    with saved_bytes(model) as plain:
        model(**batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(0)
    checkpointed_loss, checkpointed_grads = loss_and_grads(model, batch)
    assert torch.equal(loss, checkpointed_loss)
    for name, grad in grads.items():
        torch.testing.assert_close(checkpointed_grads[name], grad)
    with saved_bytes(model) as checkpointed:
        model(**batch)
    assert checkpointed.bytes < plain.bytes / 2


def test_prefix_with_gradient_checkpointing():
    batch = tiny_batch("llava")
    for model in (prepared("llava", "prefix"), randomized(add_peft(tiny_model("llava"), make_method("prefix")))):
        fuse(model).train()
        _, grads = loss_and_grads(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        _, again = loss_and_grads(model, batch)
        for name, grad in grads.items():
            torch.testing.assert_close(again[name], grad)


@pytest.mark.parametrize("method", METHODS)
def test_tree_parameters_and_state_dict_survive(method):
    model = prepared("llava", method, num_layers=1)
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model)
    fuse(model)
    assert list(modules) == [name for name, _ in model.named_modules()]
    assert parameters == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert all(isinstance(module, modules[name]) for name, module in model.named_modules())
    unfuse(unfuse(model))
    assert modules == {name: type(module) for name, module in model.named_modules()}
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not any(is_swapped(module) for module in model.modules())


def test_deepcopy_is_independent():
    model = fuse(prepared("qwen2_vl", "prefix-projection"))
    batch = tiny_batch("qwen2_vl")
    original_loss, _ = loss_and_grads(model, batch)
    twin = copy.deepcopy(model)
    loss, grads = loss_and_grads(twin, batch)
    torch.testing.assert_close(loss, original_loss)  # the copy's weights lie apart: other GEMMs, other rounding
    for parameter in model.parameters():
        parameter.data.zero_()
    twin_loss, twin_grads = loss_and_grads(twin, batch)
    assert torch.equal(loss, twin_loss) and is_fused(twin)
    assert all(torch.equal(grad, twin_grads[name]) for name, grad in grads.items())


@pytest.mark.parametrize("method", ["lora", "ia3", "layernorm-simp", "prefix"])
def test_hf_peft_saves_and_loads_around_fuse(method, tmp_path):
    from peft import PeftModel

    model = fuse(prepared("llava", method, num_layers=1))
    batch = tiny_batch("llava")
    loss, _ = loss_and_grads(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llava", num_layers=1), tmp_path, is_trainable=method != "prefix")
    torch.testing.assert_close(fuse(loaded).train()(**batch).loss.detach(), loss)


def test_save_pretrained_keeps_the_class_name(tmp_path):
    model = fuse(tiny_model("llava", num_layers=1))
    model.save_pretrained(tmp_path)
    again = type(tiny_model("llava", num_layers=1)).from_pretrained(tmp_path)
    assert again.config.architectures == ["LlavaForConditionalGeneration"]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_training_returns_no_logits_unless_kept():
    model = add_peft(tiny_model("llava"), LoRA(r=4)).train()
    batch = tiny_batch("llava")
    assert fuse(model)(**batch).logits is None
    kept = fuse(model, keep_logits=True)(**batch)
    assert kept.logits.shape == (*batch["input_ids"].shape, 60)
    assert model(**{key: value for key, value in batch.items() if key != "labels"}).logits is not None


def test_positional_arguments_and_signature():
    model = add_peft(tiny_model("llava"), LoRA(r=4, alpha=8, dropout=0.0)).train()
    before = inspect.signature(model.forward)
    batch = tiny_batch("llava")
    fuse(model)
    assert inspect.signature(model.forward) == before
    ids, pixels, mask = (batch.pop(name) for name in ("input_ids", "pixel_values", "attention_mask"))
    by_position = model(ids, pixels, mask, **batch).loss
    assert torch.equal(by_position, model(input_ids=ids, pixel_values=pixels, attention_mask=mask, **batch).loss)


def test_num_items_in_batch_divides_the_sum():
    model = add_peft(tiny_model("qwen2_vl"), LoRA(r=4, alpha=8, dropout=0.0)).train()
    batch = tiny_batch("qwen2_vl")
    expected = model(**batch, num_items_in_batch=torch.tensor(11)).loss
    torch.testing.assert_close(fuse(model)(**batch, num_items_in_batch=torch.tensor(11)).loss, expected)


def test_supervised_targets():
    labels = torch.full((2, 6), -100)
    labels[0, 0], labels[0, 3], labels[0, 5], labels[1, 2] = 9, 7, 8, 5  # a label at position 0 has no query
    rows, targets = supervised_targets(labels)
    assert rows.tolist() == [[2, 4], [1, 5]] and targets.tolist() == [[7, 8], [5, -100]]
    assert torch.equal(supervised_targets(labels, capacity=4)[1][:, :2], targets)


def test_right_padding_needs_no_mask():
    """Same loss and gradients with the mask dropped (right padding), kept (said not to be), and on the left."""
    rows, targets = torch.tensor([[3, 4], [2, 4]]), torch.tensor([[7, 7], [7, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert causality_suffices(mask, rows, targets)
    assert not causality_suffices(mask.flip(1), rows, targets)
    assert not causality_suffices(torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), rows, targets)
    assert not causality_suffices(mask, rows, torch.tensor([[7, 7], [7, 7]]))  # padding that carries a label
    assert not causality_suffices(None, rows, targets)
    model = fuse(add_peft(tiny_model("qwen2_vl"), LoRA(r=4, alpha=8, dropout=0.0))).train()
    randomize_trainable(model)
    batch = tiny_batch("qwen2_vl", padding_side="right")
    loss, grads = loss_and_grads(model, batch)
    masked_loss, masked_grads = loss_and_grads(model, batch | {"right_padded": False})
    torch.testing.assert_close(loss, masked_loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, masked_grads[name], rtol=1e-3, atol=1e-6)


def test_labels_on_padding_give_what_the_unfused_model_gives():
    model = add_peft(tiny_model("llava"), LoRA(r=4, alpha=8, dropout=0.0)).train()
    randomize_trainable(model)
    batch = tiny_batch("llava", padding_side="right")
    batch["labels"] = torch.where(batch["attention_mask"] == 0, batch["input_ids"], batch["labels"])
    expected = model(**batch).loss
    torch.testing.assert_close(fuse(model)(**batch).loss, expected)


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_tail_with_few_all_and_no_labels(share):
    model = add_peft(tiny_model("llava"), LoRA(r=4, alpha=8, dropout=0.0)).train()
    randomize_trainable(model)
    batch = tiny_batch("llava", padding_side=None)
    if share == 1.0:
        batch["labels"] = batch["input_ids"].clone()
    eager = loss_and_grads(model, batch)
    fused = loss_and_grads(fuse(model), batch)
    torch.testing.assert_close(fused[0], eager[0])
    for name, grad in eager[1].items():
        torch.testing.assert_close(fused[1][name], grad, rtol=1e-3, atol=1e-6)
    batch["labels"].fill_(-100)
    assert model(**batch).loss.isnan() and unfuse(model)(**batch).loss.isnan()


def test_adapter_switched_at_run_time():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llava"), config)
    model.add_adapter("other", config)
    batch = tiny_batch("llava")
    for parameter_name, parameter in model.named_parameters():
        if "lora" in parameter_name:
            parameter.data.normal_(std=0.2)
    losses = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        losses[name] = model.train()(**batch).loss
    fuse(model)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(model(**batch).loss, losses[name])
    with model.disable_adapter():
        plain = model(**batch).loss
    assert not torch.allclose(plain, losses["default"])


def test_dropout_same_seed_same_step():
    model = fuse(add_peft(tiny_model("qwen2_vl"), LoRA(r=4, alpha=8, dropout=0.5))).train()
    randomize_trainable(model)
    batch = tiny_batch("qwen2_vl")

    def step(seed):
        torch.manual_seed(seed)
        return loss_and_grads(model, batch)

    (first, grads), (again, grads_again), (other, _) = step(0), step(0), step(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "prefix", "layernorm"])
def test_on_meta_and_under_fake_tensors(method):
    config = copy.deepcopy(tiny_model("qwen2_vl").config)
    model = fuse(add_peft(empty_model(config, dtype=torch.bfloat16), make_method(method)))
    assert is_fused(model) and all(p.is_meta for p in model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize_fake(model)
        embeddings = torch.empty(2, 30, 256, dtype=torch.bfloat16)
        loss = model.train()(
            inputs_embeds=embeddings, labels=torch.zeros(2, 30, dtype=torch.long), supervised_capacity=4
        ).loss
        loss.backward()
    layers = model.model.language_model.layers.parameters()
    trained = [parameter for parameter in layers if parameter.requires_grad]
    trained += list(getattr(model.model.language_model, "prefix_encoder", nn.Module()).parameters())
    assert trained and all(parameter.grad.shape == parameter.shape for parameter in trained)


class Unknown(nn.Module):
    pass


@pytest.mark.parametrize(
    "break_model, message",
    [
        (lambda model: Unknown(), "Unknown has model type 'Unknown'; expected one of .*'llava'"),
        (
            lambda model: setattr(model.model.language_model.layers[1].self_attn, "attention_dropout", 0.1),
            "attention dropout is 0.1",
        ),
        (lambda model: setattr(model.model.language_model.layers[1].mlp, "act_fn", nn.GELU()), "GELU; expected SiLU"),
        (
            lambda model: setattr(model.model.language_model.layers[1].mlp, "up_proj", nn.Bilinear(2, 2, 2)),
            r"a layer of type torch\.nn\S+Bilinear cannot be read",
        ),
    ],
)
def test_refused_models_are_left_unchanged(break_model, message):
    model = tiny_model("llava")
    model = break_model(model) or model
    with pytest.raises(ValueError, match=message):
        fuse(model, strict=True)
    assert not any(is_swapped(module) for module in model.modules())


def test_add_peft_errors():
    model = tiny_model("llava", num_layers=1)
    with pytest.raises(ValueError, match=r"expected a method such as LoRA\(r=16\), got 'lora'"):
        add_peft(model, "lora")
    add_peft(model, LoRA(r=2))
    with pytest.raises(ValueError, match="carries PEFT parameters already"):
        add_peft(model, LoRA(r=2))
    with pytest.raises(ValueError, match="carries HF PEFT adapters already"):
        add_peft(add_baseline(tiny_model("llava", num_layers=1), LoRA(r=2))[0], LoRA(r=2))
    with pytest.raises(ValueError, match="is fused; call unfuse"):
        add_peft(fuse(tiny_model("llava", num_layers=1)), LoRA(r=2))


def test_a_bound_forward_of_a_fused_model_works_after_unfuse():
    """Whoever wraps `model.forward`, as accelerate does, keeps the bound method."""
    model, batch = fuse(randomized(add_peft(tiny_model("llama"), LoRA(r=4, dropout=0.0)))).train(), tiny_batch("llama")
    forwards = [module.forward for module in (model, *model.model.layers, model.model.norm)]
    unfuse(model)
    expected = model(**batch).loss
    for module, forward in zip((model, *model.model.layers, model.model.norm), forwards, strict=True):
        module.forward = forward
    assert torch.equal(model(**batch).loss, expected)


def test_a_class_derived_from_a_fused_one_is_never_dropped():
    model, batch = fuse(randomized(add_peft(tiny_model("llama"), LoRA(r=4, dropout=0.0)))).train(), tiny_batch("llama")
    layer = model.model.layers[1]
    kind = type(layer)
    layer.__class__ = type(
        "Doubled", (kind,), {"forward": lambda self, *args, **kw: 2 * kind.forward(self, *args, **kw)}
    )
    expected = loss_and_grads(model, batch)[0]
    with pytest.raises(ValueError, match="derived after fuse"):
        unfuse(model)
    assert torch.equal(loss_and_grads(model, batch)[0], expected)
    layer.__class__ = kind
    assert not is_fused(unfuse(model))
