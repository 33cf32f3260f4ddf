"""BitFit (Ben Zaken et al. 2022): biases alone are trained; or nothing, and the embeddings ask for gradients."""

import pytest
import torch

from mmpeft_fast import fuse
from mmpeft_fast.models import FAMILIES
from tests.closeness import assert_same_in_double
from tests.tiny_models import TEXT_FAMILIES, tiny_batch, tiny_model

BIASED = ("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen_vl", "llama")


def model_with_biases(family):
    """A frozen float64 model; LLaMA with the biases on q, k, v, o, gate, up and down that its configuration allows."""
    model = tiny_model(family, dtype=torch.float64)
    if family == "llama":
        model.config.attention_bias = model.config.mlp_bias = True
        torch.manual_seed(0)
        model = type(model)(model.config).double()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False).train()


def in_decoder(model, name):
    decoder = name.startswith("transformer.h.") or ("visual" not in name and "vision" not in name)
    return decoder and not name.startswith("lm_head")


def chosen(model, which):
    where, suffix = which
    names = [name for name, _ in model.named_parameters() if name.endswith("bias") and name.endswith(suffix)]
    if where == "decoder":
        return [name for name in names if in_decoder(model, name)]
    if where == "tower":
        return [name for name in names if not in_decoder(model, name)]
    return [name for name in names if f".{where}." in name]


def gradients(family, which, *, is_fused, checkpointed=False, compiled=False):
    model = model_with_biases(family)
    names = chosen(model, which)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    if is_fused:
        fuse(model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    call = torch.compile(model, backend="aot_eager") if compiled else model
    loss = call(**tiny_batch(family, dtype=torch.float64)).loss
    loss.backward()
    return loss, {name: model.get_parameter(name).grad for name in names}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "which",
    [("decoder", "bias"), ("decoder", "k_proj.bias"), ("0", "proj.bias"), ("1", "q_proj.bias"), ("tower", "bias")],
    ids=" ".join,
)
@pytest.mark.parametrize("family", BIASED)
def test_biases_alone(family, which, checkpointed):
    names = chosen(model_with_biases(family), which)
    if not names:
        pytest.skip("the family has no such biases")
    expected_loss, expected = gradients(family, which, is_fused=False)
    loss, grads = gradients(family, which, is_fused=True, checkpointed=checkpointed)
    assert_same(loss, grads, expected_loss, expected)


def assert_same(loss, grads, expected_loss, expected):
    assert_same_in_double(loss, expected_loss)
    norms = {name: torch.linalg.vector_norm(grad) for name, grad in expected.items()}
    negligible = torch.finfo(torch.float32).eps * max(norms.values())  # keys of unrotated heads take no bias's gradient
    for name, grad in grads.items():
        assert grad is not None, name
        if norms[name] > negligible:
            assert_same_in_double(grad, expected[name], name)


def test_biases_alone_in_one_graph():
    which = ("decoder", "bias")
    expected = gradients("qwen2", which, is_fused=False)
    assert_same(*gradients("qwen2", which, is_fused=True, compiled=True), *expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_trained_but_the_embeddings_ask(family):
    results = []
    for is_fused in (False, True):
        model = tiny_model(family, dtype=torch.float64).requires_grad_(False).train()
        if is_fused:
            fuse(model)
        batch = tiny_batch(family)
        ids = batch.pop("input_ids")
        if family not in TEXT_FAMILIES:
            batch = {name: batch[name] for name in ("attention_mask", "labels")}
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embeddings, **batch).loss
        loss.backward()
        results.append((loss, embeddings.grad))
    (expected_loss, expected), (loss, grad) = results
    assert_same_in_double(loss, expected_loss)
    assert_same_in_double(grad, expected, "embeddings")
