"""A method from outside of the package goes through every door: fused, stored, planned, profiled, trained, studied."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from mmpeft_fast import (
    BranchPlacement,
    LoRA,
    Method,
    Placement,
    add_peft,
    cli,
    fuse,
    fuse_report,
    load_peft,
    merge_peft,
    plugins,
    save_peft,
)
from mmpeft_fast.methods import METHODS, make_method, register_method
from mmpeft_fast.stored.baseline import add_baseline
from mmpeft_fast.study.cells import StudyConfig, plan
from tests.closeness import assert_same_in_double
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model


@dataclass(frozen=True, kw_only=True)
class Twice(Method):
    """A nonlinear branch on two of the MLP's linear layers, and a scale on o's output."""

    ranks: tuple[int, ...] = (2, 3)
    small_learning_rate = 5e-3

    def place(self, roles=()):
        branch = BranchPlacement(position="parallel", rank=sum(self.ranks), activation="silu")
        return Placement(branches={"up": branch, "down": branch}, scales={"o": "output"})


@dataclass(frozen=True, kw_only=True)
class WiderLoRA(LoRA):
    """Computes something else than LoRA: twice the rank."""

    def place(self, roles=()):
        return LoRA(**vars(self) | {"r": 2 * self.r}).place(roles or ("q", "k", "v", "o", "gate", "up", "down"))


@pytest.fixture
def registered():
    before = dict(METHODS)
    register_method("twice", Twice)
    register_method("wider", WiderLoRA)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize(
    "name, settings", [("twice", {"ranks": (1, 4)}), ("wider", {"r": 2, "alpha": 4, "dropout": 0.0})]
)
def test_it_is_fused_saved_and_loaded(registered, tmp_path, name, settings):
    method = make_method(name, **settings)
    model = add_peft(tiny_model("llava", dtype=torch.float64), method)
    randomize_trainable(model)
    model.double().train()
    batch = tiny_batch("llava", dtype=torch.float64)
    loss, grads = loss_and_grads(model, batch)
    fused_loss, fused_grads = loss_and_grads(fuse(model), batch)
    assert_same_in_double(fused_loss, loss)
    for key, grad in grads.items():
        assert_same_in_double(fused_grads[key], grad, key)

    save_peft(model, tmp_path / "adapter")
    loaded = load_peft(tiny_model("llava", dtype=torch.float64), tmp_path / "adapter")
    assert loaded.peft_method == method and type(loaded.peft_method) is type(method)
    expected = {key: value for key, value in model.state_dict().items() if key in grads}
    assert expected and all(torch.equal(loaded.state_dict()[key], value) for key, value in expected.items())


def test_a_subclass_is_not_compared_with_its_parents_form_in_hf_peft(registered):
    assert add_baseline(tiny_model("llama"), make_method("wider", r=2))[1] == "eager module"
    assert add_baseline(tiny_model("llama"), LoRA(r=2))[1].startswith("HF PEFT")


def test_merging_asks_the_branches(registered):
    model = add_peft(tiny_model("llama", dtype=torch.float64), make_method("wider", r=2, dropout=0.0))
    randomize_trainable(model)
    batch = {name: value for name, value in tiny_batch("llama").items() if name != "labels"}
    with torch.no_grad():
        expected = model.double().eval()(**batch).logits
        assert_same_in_double(merge_peft(model)(**batch).logits, expected)
    with pytest.raises(ValueError, match="silu makes it nonlinear"):
        merge_peft(add_peft(tiny_model("llama"), make_method("twice")))


def test_a_method_that_is_not_known_here_is_one_sentence(registered, tmp_path):
    save_peft(add_peft(tiny_model("llama"), make_method("twice")), tmp_path / "adapter")
    del METHODS["twice"]
    with pytest.raises(ValueError, match=r"expected a method among .*, got 'Twice'; register_method makes"):
        load_peft(tiny_model("llama"), tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings, said",
    [({"rank": 3}, "has no setting 'rank'"), ({"ranks": "ab"}, r"Twice\.ranks: expected"), (3, "settings")],
)
def test_damaged_settings_are_one_sentence(registered, tmp_path, settings, said):
    save_peft(add_peft(tiny_model("llama"), make_method("twice")), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": settings}))
    with pytest.raises(ValueError, match=said):
        load_peft(tiny_model("llama"), tmp_path / "adapter")


def test_the_command_line_plans_and_profiles_it(registered, tmp_path, capsys):
    assert cli.main(["plan", "--model", "llava-1.5-7b", "--method", "twice", "--device", "h100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_params"] == 32 * (5 * 2 * (4096 + 11008) + 4096)
    words = ["--model", "tiny-llava", "--method", "twice", "--seq-len", "96", "--device", "cpu", "--what", "layer"]
    words += ["--steps", "2", "--device-profile", "none", "--output", str(tmp_path / "profile")]
    assert cli.main(["profile", *words, "--json"]) == 0
    assert "fused" in json.loads(capsys.readouterr().out)["implementations"]


def test_the_study_has_a_row_for_it(registered, tmp_path):
    cells = plan(StudyConfig(output=tmp_path, models=("tiny-llava",), methods=("twice",)))[1]
    assert [(cell.method, cell.implementation) for cell in cells if not cell.axis] == [
        ("none", "frozen"), ("twice", "peft"), ("twice", "fused")
    ]  # fmt: skip
    assert [(cell.axis, cell.value) for cell in cells if cell.axis and cell.method == "twice"] == [("task", "seen")]
    assert cells[1].learning_rate == Twice.small_learning_rate


@pytest.mark.parametrize(
    "name, build, error, said",
    [
        ("lora", Twice, ValueError, "'lora' is a LoRA already"),
        ("mine", int, TypeError, "expected a dataclass that derives from Method"),
        ("mine", lambda: LoRA(), TypeError, "expected a dataclass"),
        ("second", type("LoRA", (Twice,), {}), ValueError, "another method of class LoRA already"),
    ],
)
def test_what_cannot_be_registered(registered, name, build, error, said):
    with pytest.raises(error, match=said):
        register_method(name, build)


def test_a_plugin_that_cannot_be_loaded_is_one_sentence(monkeypatch, capsys):
    point = plugins.metadata.EntryPoint(name="mine", value="no.such.module", group=plugins.GROUP)
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: [point])
    assert cli.main(["plan", "--model", "tiny-llava"]) == 2
    assert "error: plugin mine = no.such.module: cannot be loaded" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class SharedLoRA(Method):
    """ShareLoRA and MSPLoRA in one: on each target one branch whose D all layers share, one whose D and U two layers
    share, and one of the layer's own."""

    r: int = 3

    def place(self, roles=()):
        branches = (
            BranchPlacement(position="parallel", rank=self.r, down_layers=0),
            BranchPlacement(position="parallel", rank=2, down_layers=2, up_layers=2),
            BranchPlacement(position="parallel", rank=1),
        )
        return Placement(branches={"q": branches, "down": branches})


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_branches_side_by_side_that_layers_share(family, tmp_path):
    method = SharedLoRA()
    model = add_peft(tiny_model(family, num_layers=3, dtype=torch.float64), method)
    randomize_trainable(model)
    model.double().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    # q and down: one D of rank 3 and three U; two pairs of rank 2; three pairs of rank 1.
    assert len(trained) == 2 * (1 + 3 + 2 * 2 + 3 * 2)
    batch = tiny_batch(family, dtype=torch.float64)
    loss, grads = loss_and_grads(model, batch)
    fused_loss, fused_grads = loss_and_grads(fuse(model), batch)
    assert not fuse_report(model).kept
    assert_same_in_double(fused_loss, loss)
    assert len(grads) == len(trained)
    for key, grad in grads.items():
        assert_same_in_double(fused_grads[key], grad, key)

    save_peft(model, tmp_path / "adapter")
    register_method("shared", SharedLoRA)
    try:
        assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == len(trained)
        loaded = load_peft(tiny_model(family, num_layers=3, dtype=torch.float64), tmp_path / "adapter").train()
        assert_same_in_double(loss_and_grads(loaded, batch)[0], loss)
        with torch.no_grad():
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            expected = model.eval()(**inputs).logits
            assert_same_in_double(merge_peft(loaded).eval()(**inputs).logits, expected)
    finally:
        del METHODS["shared"]


@pytest.mark.parametrize("by_hf_peft", [False, True], ids=["eager", "hf-peft"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_some_layers_alone(name, by_hf_peft, tmp_path):
    layers, count = {"lora": ("0-1", 2), "ia3": (1, 1)}.get(name, ((0, "2"), 2))
    method = make_method(name, layers=layers)
    model, _ = add_baseline(tiny_model("llama", num_layers=3, dtype=torch.float64), method)
    if not by_hf_peft:
        model = add_peft(tiny_model("llama", num_layers=3, dtype=torch.float64), method)
    randomize_trainable(model)
    model.double().train()
    whole = add_peft(tiny_model("llama", num_layers=3), make_method(name))
    placement = method.place()
    parts = [part for role in placement.branches for part in placement.branches_of(role)]
    shares = any((part.down_layers, part.up_layers) != (1, 1) and not part.frozen for part in parts)
    if not placement.parts and not placement.tasks and not shares:  # else it trains what is no single layer's
        numbers = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (model, whole)]
        assert numbers[0] * 3 == numbers[1] * count
    batch = tiny_batch("llama", dtype=torch.float64)
    if "dropout" in vars(method):
        model.eval()
    loss, grads = loss_and_grads(model, batch)
    fused_loss, fused_grads = loss_and_grads(fuse(model), batch)
    assert_same_in_double(fused_loss, loss)
    for key, grad in grads.items():
        assert_same_in_double(fused_grads[key], grad, key)
    save_peft(model, tmp_path / "adapter")
    loaded = load_peft(tiny_model("llama", num_layers=3, dtype=torch.float64), tmp_path / "adapter")
    assert loaded.peft_method.adapted_layers(3) == method.adapted_layers(3)
    assert_same_in_double(loss_and_grads(loaded.eval(), batch)[0], loss_and_grads(model.eval(), batch)[0])


@pytest.mark.parametrize("layers", ["a", "3-1", (), (0, 0), -1, 1.5, "1-", "0-999999"])
def test_layers_that_mean_nothing(layers):
    with pytest.raises(ValueError, match=r"LoRA\.layers: expected"):
        LoRA(layers=layers)
    with pytest.raises(ValueError, match=r"LoRA\.layers: expected indices below 2, got 2"):
        add_peft(tiny_model("llama"), LoRA(layers="1-2"))
