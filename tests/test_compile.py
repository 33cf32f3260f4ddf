"""torch.compile of fused models: one graph, the same losses, gradients and bytes kept as without."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from mmpeft_fast import LoRA, add_peft, fuse, make_method, provider
from mmpeft_fast.measure import saved_bytes
from tests.closeness import assert_as_close_as_eager
from tests.test_parity import prepared
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

HINTS = {"supervised_capacity": 6, "right_padded": True}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def lora(family="llama", *, dropout=0.3, num_layers=2):
    model = fuse(add_peft(tiny_model(family, num_layers=num_layers), LoRA(r=4, alpha=8, dropout=dropout))).train()
    randomize_trainable(model)
    return model


def compiled(model, backend="aot_eager"):
    """The model as one graph (a break is an error), and the counter of its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def step(model, batch, seed=0):
    torch.manual_seed(seed)
    loss, grads = loss_and_grads(model, batch)
    return loss, {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}


def assert_same_step(model, graph, batch, seed=0):
    """Bit by bit: the same kernels run."""
    (loss, grads), (graph_loss, graph_grads) = step(model, batch, seed), step(graph, batch, seed)
    assert torch.equal(graph_loss, loss)
    assert list(graph_grads) == list(grads)
    for name, grad in grads.items():
        assert torch.equal(graph_grads[name], grad), name


@pytest.mark.parametrize(
    "family, method",
    [
        *(("llama", name) for name in ("lora", "adapter-both", "prefix", "prefix-projection", "layernorm-simp")),
        *(("qwen3", name) for name in ("ia3", "lora-attention")),
        ("qwen2", "adapter"),
    ],
)
def test_training_step_as_one_graph(family, method):
    """LoRA, IA3, LayerNorm and prefix without projection are HF PEFT's modules, the others this package's."""
    model = fuse(prepared(family, method))
    graph, counter = compiled(model)
    batch = tiny_batch(family) | HINTS
    for _ in range(3):
        assert_same_step(model, graph, batch)
    assert counter.frame_count == 1


def test_dynamo_alone():
    model = lora()
    assert_same_step(model, compiled(model, "eager")[0], tiny_batch("llama") | HINTS)


def assert_step_as_close(model, graph, batch):
    """The graph's loss and gradients are as close to float64's as those without a compiler."""
    (loss, grads), (graph_loss, graph_grads) = step(model, batch), step(graph, batch)
    truth_loss, truth = step(copy.deepcopy(model).double(), batch)
    assert_as_close_as_eager(graph_loss, loss, truth_loss, "loss")
    for name, grad in grads.items():
        assert_as_close_as_eager(graph_grads[name], grad, truth[name], name)


def test_inductor():
    model = lora(num_layers=1)
    batch = tiny_batch("llama") | HINTS
    with torch._inductor.config.patch(fallback_random=True):  # eager's seeds, hence its masks
        graph, _ = compiled(model, "inductor")
        assert_step_as_close(model, graph, batch)


def test_seeds_change_masks_and_compile_nothing():
    model = lora()
    graph, counter = compiled(model)
    batch = tiny_batch("llama") | HINTS
    for seed in (0, 1, 0):
        assert_same_step(model, graph, batch, seed)
    first, other = (step(graph, batch, seed)[0] for seed in (0, 1))
    assert not torch.equal(first, other) and counter.frame_count == 1
    losses = {graph(**batch).loss.item() for _ in range(4)}  # one generator, running on
    assert len(losses) == 4 and counter.frame_count == 1


@pytest.mark.parametrize("method", ["lora", "ia3", "adapter"])
def test_as_many_bytes_are_kept(method):
    model = fuse(add_peft(tiny_model("llama"), make_method(method))).train()
    batch = tiny_batch("llama") | HINTS
    with saved_bytes(model) as eager:
        model(**batch)
    graph, _ = compiled(model)
    node = graph(**batch).loss.grad_fn
    assert type(node).__name__ == "CompiledFunctionBackward"
    owned = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in node.saved_tensors}
    assert 0 < sum(size for key, size in kept.items() if key not in owned) <= eager.bytes


def test_without_hints_all_positions_are_computed():
    """Nothing is read from tensors, so the tail is not sparse: the same numbers in another order."""
    model = lora(dropout=0.0)
    graph, _ = compiled(model)
    batch = tiny_batch("llama")
    assert_step_as_close(model, graph, batch)


def test_lengths_compile_once_more():
    model = lora()
    graph, counter = compiled(model)
    whole = tiny_batch("llama", padding_side="left")
    whole["labels"][:, 5:9] = whole["input_ids"][:, 5:9]
    graphs = []
    for length in (30, 27, 24, 19):
        batch = {name: tensor[:, :length] for name, tensor in whole.items()} | {"supervised_capacity": 10}
        assert_same_step(model, graph, batch)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2]  # the second has a length of any number


def test_eval():
    model = lora().eval()
    graph, counter = compiled(model)
    batch = tiny_batch("llama")
    with torch.no_grad():
        expected, got = model(**batch), graph(**batch)  # with a cache, that is
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)
    assert torch.equal(got.past_key_values.layers[1].keys, expected.past_key_values.layers[1].keys)
    assert counter.frame_count == 1


def test_autocast_and_bf16():
    model = lora(num_layers=1)
    batch = tiny_batch("llama") | HINTS
    graph, _ = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(model, graph, batch)
    torch._dynamo.reset()
    model.bfloat16()
    assert_same_step(model, graph, batch)


def test_adapters_providers_and_frozen_parameters_are_guarded():
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_dropout=0.2)
    model = get_peft_model(tiny_model("llama", num_layers=1), config)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj"], init_lora_weights=False))
    graph, counter = compiled(fuse(model).train())
    batch = tiny_batch("llama") | HINTS
    graphs = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert_same_step(model, graph, batch)
        graphs.append(counter.frame_count)
    with provider("torch"):
        assert_same_step(model, graph, batch)
        graphs.append(counter.frame_count)
    model.base_model.model.model.layers[0].mlp.requires_grad_(False)
    assert_same_step(model, graph, batch)
    assert [*graphs, counter.frame_count] == [1, 2, 2, 3, 4]


def test_a_copy_whose_weights_lie_apart():
    model = copy.deepcopy(lora())
    loss, grads = step(model, tiny_batch("llama") | HINTS)
    graph_loss, graph_grads = step(compiled(model)[0], tiny_batch("llama") | HINTS)
    assert torch.equal(graph_loss, loss)
    truth = step(copy.deepcopy(model).double(), tiny_batch("llama") | HINTS)[1]
    for name, grad in grads.items():
        assert_as_close_as_eager(graph_grads[name], grad, truth[name], name)


def test_a_layer_that_cannot_be_read_says_so_and_runs_unfused(caplog):
    model = lora(dropout=0.0)
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    graph, _ = compiled(model)
    with caplog.at_level(logging.WARNING, "mmpeft_fast"):
        step(graph, tiny_batch("llama") | HINTS)
    assert [record.getMessage() for record in caplog.records] == [
        "layer 0 runs unfused: a PeftLinear carries hooks, which fused code would not run"
    ]
    assert_same_step(model, graph, tiny_batch("llama") | HINTS)


def test_gradient_checkpointing():
    model = lora(dropout=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # a hook that no compiler takes, in stock models either
    graph, counter = compiled(model)
    batch = tiny_batch("llama") | HINTS
    (loss, grads), (graph_loss, graph_grads) = step(model, batch), step(graph, batch)
    truth = step(copy.deepcopy(model).double(), batch)[1]
    assert torch.equal(graph_loss, loss) and counter.frame_count == 1
    for name, grad in grads.items():
        assert_as_close_as_eager(graph_grads[name], grad, truth[name], name)


def breaks(model, batch):
    """Where dynamo breaks the graph, by file and line."""
    explained = torch._dynamo.explain(model)(**batch)
    return {(reason.user_stack[-1].filename, reason.user_stack[-1].lineno) for reason in explained.break_reasons}


def test_image_models_break_where_stock_ones_do():
    model = add_peft(tiny_model("qwen_vl", num_layers=1), LoRA(r=4, dropout=0.1)).train()
    batch = tiny_batch("qwen_vl")
    stock = breaks(model, batch | {"use_cache": False})
    torch._dynamo.reset()
    fused = breaks(fuse(model), batch | HINTS)
    assert stock and fused <= stock


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_text_behind_images_is_one_graph(family):
    """What image towers and placeholders give is data-dependent in stock models; embeddings are not."""
    model = lora(family, num_layers=1)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 30, 256, generator=generator)
    labels = torch.randint(40, 60, (2, 30), generator=generator)
    labels[:, 5:] = -100
    batch = {"inputs_embeds": embeddings, "labels": labels, "attention_mask": torch.ones_like(labels)} | HINTS
    assert_same_step(model, compiled(model)[0], batch)
