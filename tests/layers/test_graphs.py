"""Layers replayed as CUDA graphs: the logic, on a stand-in for the graph that runs the recorded function again."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import Tensor

from mmpeft_fast import fuse, fuse_report, unfuse
from mmpeft_fast.layers import graphs
from mmpeft_fast.peft_model import add_peft, study_method
from tests.tiny_models import randomize_trainable, tiny_batch, tiny_model

LAYERS = 4  # the last one is the tail, which stays eager
METHODS = {
    "lora": {"r": 4, "dropout": 0.25},
    "ia3": {},
    "adapter": {"bottleneck": 4, "dropout": 0.25},
    "prefix": {"num_virtual_tokens": 3},
    "prefix-projection": {"num_virtual_tokens": 3, "projection": True},
    "layernorm": {},
}


class _Again:
    """As a graph does it: outputs lie where they lay the last time, hold nothing before the first replay, and what was
    recorded reads its inputs where they were."""

    def __init__(self, function):
        self._function, self._made = function, function()
        self.outputs = [None if made is None else torch.full_like(made, float("nan")) for made in self._made]

    def replay(self) -> None:
        with torch.enable_grad():
            made, self._made = self._made or self._function(), None
        for output, value in zip(self.outputs, made, strict=True):
            if output is not None:
                output.data.copy_(value.detach())


class StandIn:
    """Records like `CudaRecorder`; counts replays, and fails at recording number `fails_at`."""

    def __init__(self, fails_at: int | None = None):
        self.fails_at, self.num_recorded, self.num_replayed = fails_at, 0, 0

    def record(self, function) -> _Again:
        self.num_recorded += 1
        if self.num_recorded == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nsecond line")
        made = _Again(function)
        replay = made.replay

        def counted():
            self.num_replayed += 1
            replay()

        made.replay = counted
        return made

    def synchronize(self) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch):
    recorder = StandIn()
    monkeypatch.setattr(graphs, "recorder_for", lambda device: recorder)
    return recorder


def prepared(method="lora", family="llama", **settings):
    model = tiny_model(family, num_layers=LAYERS)
    name, settings = method.partition("-")[0], METHODS[method] | settings
    model = add_peft(model, study_method(model, name, **settings))
    randomize_trainable(model)
    return model.train()


def pair(model, **options):
    """The model fused and run eagerly, and a copy of it with graphs."""
    other = copy.deepcopy(model)
    return fuse(model, **options), fuse(other, cuda_graphs=True, **options)


def step(model, batch, *, seed=0, backward=True) -> Tensor:
    torch.manual_seed(seed)
    loss = model(**batch).loss
    if backward:
        loss.backward()
    return loss


def grads(model) -> dict[str, Tensor]:
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def assert_same_grads(one, two) -> None:
    wanted, got = grads(one), grads(two)
    assert wanted.keys() == got.keys() and wanted
    for name, grad in wanted.items():
        assert torch.equal(grad, got[name]), name


def assert_same_steps(eager, graphed, batches) -> None:
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (eager, graphed)]
    for number, batch in enumerate(batches):
        losses = [step(model, batch, seed=number) for model in (eager, graphed)]
        assert torch.equal(*losses), number
        assert_same_grads(eager, graphed)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def graphs_of(model) -> graphs.LayerGraphs:
    return next(layer.graphs for layer in model.modules() if getattr(layer, "graphs", None) is not None)


def recorded(model) -> int:
    return graphs_of(model).num_recorded


@pytest.mark.parametrize("family", ["llama", "llava", "qwen3", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_step_after_step(stand_in, method, family):
    eager, graphed = pair(prepared(method, family))
    batches = [tiny_batch(family, seed=number) for number in range(5)]
    assert_same_steps(eager, graphed, batches)
    assert recorded(graphed) == LAYERS - 1
    # Three steps of forward and backward; below the first trained parameter nothing is differentiated.
    assert 4 * (LAYERS - 1) < stand_in.num_replayed <= 6 * (LAYERS - 1)
    assert f"CUDA graphs: {LAYERS - 1} layers recorded at 1 shapes" in str(fuse_report(graphed))


def test_left_padding_and_its_mask(stand_in):
    eager, graphed = pair(prepared())
    assert_same_steps(eager, graphed, [tiny_batch("llama", padding_side="left", seed=seed) for seed in range(4)])
    assert recorded(graphed) == LAYERS - 1


def test_trained_embeddings_and_all_layers(stand_in):
    """Gradients flow into the first layer's input; every layer is recorded where the tail is not sparse."""
    model = prepared()
    model.get_input_embeddings().weight.requires_grad_(True)
    eager, graphed = pair(model, keep_logits=True)
    assert_same_steps(eager, graphed, [tiny_batch("llama", seed=seed) for seed in range(4)])
    assert recorded(graphed) == LAYERS


def test_recomputing_in_a_recorded_backward(stand_in):
    model = prepared()
    eager, graphed = fuse(copy.deepcopy(model)), fuse(model, cuda_graphs=True, recompute="gate_up+qkv")
    assert_same_steps(eager, graphed, [tiny_batch("llama", seed=seed) for seed in range(5)])
    assert recorded(graphed) == LAYERS - 1


def test_shapes_have_graphs_of_their_own_and_the_oldest_go(stand_in):
    eager, graphed = pair(prepared())
    graphs_of(graphed).most_shapes = 2
    batches = [tiny_batch("llama", batch_size=size) for size in (1, 2, 1, 2, 3, 3, 1, 4, 1, 2, 3, 1, 1, 3, 3)]
    assert_same_steps(eager, graphed, batches)
    assert recorded(graphed) == 2 * (LAYERS - 1)


def test_gradients_accumulate(stand_in):
    eager, graphed = pair(prepared())
    for number in range(6):
        for model in (eager, graphed):
            step(model, tiny_batch("llama", seed=number), seed=number)
        assert_same_grads(eager, graphed)
        if number % 3 == 2:
            eager.zero_grad(), graphed.zero_grad()
    for number in range(2):  # in place, and scaled in place
        for model in (eager, graphed):
            model.zero_grad(set_to_none=False)
            step(model, tiny_batch("llama", seed=number), seed=number)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
        assert_same_grads(eager, graphed)


def _warm(*models, steps=4) -> None:
    for number in range(steps):
        for model in models:
            step(model, tiny_batch("llama", seed=number), seed=number)
            model.zero_grad()


def test_two_forwards_before_a_backward(stand_in):
    eager, graphed = pair(prepared())
    _warm(eager, graphed)
    for model in (eager, graphed):
        losses = [step(model, tiny_batch("llama", seed=seed), seed=seed, backward=False) for seed in (5, 6)]
        losses[0].backward()
        losses[1].backward()
    assert_same_grads(eager, graphed)
    assert "a forward before the backward of another one" in str(fuse_report(graphed))


def test_two_forwards_of_different_shapes_before_a_backward(stand_in):
    eager, graphed = pair(prepared())
    batches = [tiny_batch("llama", batch_size=size) for size in (2, 3)]
    for _ in range(4):
        for model in (eager, graphed):
            model.zero_grad()
            losses = [step(model, batch, seed=7, backward=False) for batch in batches]
            (losses[0] + losses[1]).backward()
        assert_same_grads(eager, graphed)


def test_a_forward_that_nobody_differentiates_is_forgotten(stand_in):
    eager, graphed = pair(prepared())
    for number in range(6):
        for model in (eager, graphed):
            step(model, tiny_batch("llama"), seed=number, backward=number % 2 == 1)
    assert_same_grads(eager, graphed)
    assert recorded(graphed) == LAYERS - 1 and not graphs_of(graphed).open_passes()


def test_a_second_backward_says_what_happened(stand_in):
    _, graphed = pair(prepared())
    _warm(graphed)
    loss = step(graphed, tiny_batch("llama"), backward=False)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"ran a second time.*expected one backward"):
        loss.backward()


def test_evaluation_and_decoding_in_between(stand_in):
    eager, graphed = pair(prepared())
    batch = tiny_batch("llama", padding_side="left")
    for number in range(4):
        outputs = []
        for model in (eager, graphed):
            step(model.train(), batch, seed=number)
            with torch.no_grad():
                model.eval()
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                tokens = model.generate(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2
                )
            outputs.append((logits, tokens))
        assert all(map(torch.equal, *outputs))
        assert_same_grads(eager, graphed)
    assert recorded(graphed) == LAYERS - 1  # once: evaluation does not end what was recorded


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(stand_in, reentrant):
    model = prepared()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    eager, graphed = pair(model)
    assert_same_steps(eager, graphed, [tiny_batch("llama", seed=seed) for seed in range(5)])


@pytest.mark.parametrize("change", ["moved", "frozen", "dropout", "scaling", "another", "attention"])
def test_what_changes_in_a_layer_is_seen(stand_in, change):
    model = get_peft_model(
        tiny_model("llama", num_layers=LAYERS),
        LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    ).train()
    eager, graphed = pair(model)
    _warm(eager, graphed)
    for model in (eager, graphed):
        layer = model.base_model.model.model.layers[1]
        lora = layer.self_attn.q_proj
        weight = lora.lora_A["default"].weight
        match change:
            case "moved":
                weight.data = weight.data * 2
            case "frozen":
                weight.requires_grad_(False)
            case "dropout":
                lora.lora_dropout["default"].p = 0.5
            case "scaling":
                lora.scaling["default"] = 3.0
            case "another":
                lora.lora_A["default"].weight = torch.nn.Parameter(weight.detach() * 2)
            case "attention":
                layer.self_attn.scaling = 0.01
    for number in range(4):
        losses = [step(model, tiny_batch("llama", seed=number), seed=number) for model in (eager, graphed)]
        assert torch.equal(*losses)
        assert_same_grads(eager, graphed)
    assert recorded(graphed) == LAYERS - 1  # again


def test_tensors_that_move_at_every_step_are_not_recorded_for_ever(stand_in):
    eager, graphed = pair(prepared())
    for number in range(16):
        for model in (eager, graphed):
            weight = model.model.layers[1].self_attn.q_proj.branches[0].down
            weight.data = weight.data.clone()
            model.zero_grad()
            step(model, tiny_batch("llama"), seed=number)
        assert_same_grads(eager, graphed)
    assert "its tensors move from step to step" in graphs_of(graphed).reasons
    assert not recorded(graphed) and stand_in.num_recorded < 16 * LAYERS


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"vera": True}], ids=["dora", "vera"])
def test_tensors_that_are_computed_from_parameters_are_not_recorded(stand_in, settings):
    targets = ["q_proj", "down_proj"]
    config = VeraConfig(r=4, target_modules=["q_proj", "o_proj"]) if settings.get("vera") else None
    model = get_peft_model(
        tiny_model("llama", num_layers=LAYERS), config or LoraConfig(r=4, target_modules=targets, **settings)
    )
    randomize_trainable(model)
    eager, graphed = pair(model.train())
    assert_same_steps(eager, graphed, [tiny_batch("llama", seed=number) for number in range(5)])
    assert "weights are computed at every call" in graphs_of(graphed).reasons and not recorded(graphed)


def test_what_looks_at_a_layer_sees_tensors_of_its_own(stand_in):
    eager, graphed = pair(prepared())
    _warm(eager, graphed)
    seen = {}
    for name, model in (("eager", eager), ("graphed", graphed)):
        model.model.layers[1].register_forward_hook(
            lambda module, args, out, name=name: seen.setdefault(name, []).append(out)
        )
    for number in range(2):
        for model in (eager, graphed):
            step(model, tiny_batch("llama", seed=number), seed=number)
    assert all(map(torch.equal, seen["eager"], seen["graphed"]))
    kept = [
        [model(**tiny_batch("llama", seed=seed), output_hidden_states=True).hidden_states for seed in (1, 2)]
        for model in (eager.eval(), graphed.eval())
    ]
    assert all(map(torch.equal, *(sum(states, ()) for states in kept)))
    assert "a layer's output is looked at" in graphs_of(graphed).reasons


def test_autocast(stand_in):
    eager, graphed = pair(prepared())
    for number in range(6):
        for model in (eager, graphed):
            with torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 0):
                step(model, tiny_batch("llama"), seed=number)
    assert_same_grads(eager, graphed)
    assert recorded(graphed) == 2 * (LAYERS - 1)


@pytest.mark.parametrize("fails_at", [1, 3, LAYERS, LAYERS + 1])
def test_a_recording_that_fails_is_said_and_the_step_runs(stand_in, fails_at, caplog):
    stand_in.fails_at = fails_at
    eager, graphed = pair(prepared())
    assert_same_steps(eager, graphed, [tiny_batch("llama", seed=seed) for seed in range(4)])
    assert "operation not permitted when stream is capturing" in caplog.text and "second line" not in caplog.text


def test_copies_pickles_and_unfuse_start_without(stand_in):
    _, graphed = pair(prepared())
    _warm(graphed)
    for other in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed))):
        assert graphs_of(other) is not graphs_of(graphed) and not recorded(other)
        graphed.zero_grad(), other.zero_grad()
        step(graphed, tiny_batch("llama")), step(other, tiny_batch("llama"))
        # Weights lie in another way in a copy, so that products have other last bits.
        torch.testing.assert_close(grads(other), grads(graphed), rtol=1e-4, atol=1e-4)
        assert {id(layer.graphs) for layer in other.model.layers} == {id(graphs_of(other))}
    assert not any("graphs" in module.__dict__ for module in unfuse(graphed).modules())
    assert all(layer.graphs is None for layer in fuse(graphed).model.layers)


def test_on_a_cpu_everything_is_eager_and_said():
    eager, graphed = pair(prepared())
    assert_same_steps(eager, graphed, [tiny_batch("llama")] * 3)
    assert "CUDA graphs: 0 layers recorded at 0 shapes; eager at times: tensors are on cpu" in str(fuse_report(graphed))
    assert "CUDA graphs" not in str(fuse_report(eager))


def test_what_watches_every_operator_sees_them(stand_in):
    from torch.utils.flop_counter import FlopCounterMode

    eager, graphed = pair(prepared())
    _warm(eager, graphed)
    counts = []
    for model in (eager, graphed):
        with FlopCounterMode(display=False) as counter:
            step(model, tiny_batch("llama"))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
