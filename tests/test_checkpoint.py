"""Adapters on disk: HF PEFT loads ours and we load its, nothing is lost, and what does not fit is refused untouched."""

import copy
import json
import warnings

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, PrefixTuningConfig, VeraConfig, get_peft_model
from peft import get_peft_model_state_dict as hf_tensors
from safetensors.torch import load_file, save_file

from mmpeft_fast import (
    IA3,
    Adapter,
    DoRA,
    LayerNorm,
    LoRA,
    LoRAFA,
    Prefix,
    VeRA,
    add_peft,
    fuse,
    is_fused,
    load_peft,
    save_peft,
)
from mmpeft_fast.stored.baseline import add_baseline
from mmpeft_fast.stored.hf_config import hf_config, method_of
from mmpeft_fast.stored.slots import read_carried
from tests.tiny_models import randomize_trainable, tiny_batch, tiny_model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
METHODS = {
    "lora": LoRA(r=4, alpha=9, dropout=0.0, targets="attention"),
    "lora-rank-stabilized": LoRA(r=3, alpha=5, dropout=0.0, targets=("o", "gate"), rank_stabilized=True),
    "lora-fa": LoRAFA(r=4, alpha=8, dropout=0.0, targets=("o", "up")),
    "dora": DoRA(r=4, alpha=8, targets="both"),
    "vera": VeRA(r=4, targets="both", projection_seed=3, d_initial=0.2),
    "ia3": IA3(targets=("o", "down")),
    "prefix": Prefix(num_virtual_tokens=5),
    "prefix-projection": Prefix(num_virtual_tokens=5, projection=True, projection_width=7),
    "layernorm": LayerNorm(final=True),
    "layernorm-parts": LayerNorm(embeddings=True, head=True),
}
ADAPTERS = {
    "adapter": Adapter(bottleneck=3, dropout=0.0, targets="both", scaling=0.7),
    "adapter-parallel": Adapter(bottleneck=3, dropout=0.0, placement="parallel", activation="gelu", init="kaiming"),
}
CASES = [
    (family, name, train_connector)
    for family, train_connector in (("llava", True), ("qwen2_vl", False), ("qwen_vl", True))
    for name in METHODS
    if not (family == "qwen2_vl" and name.startswith("prefix"))  # HF PEFT 0.21 does not run it on such positions
]


def added(family, method, *, train_connector=False, dtype=torch.float32):
    model = add_peft(tiny_model(family, num_layers=1, dtype=dtype), method, train_connector=train_connector)
    randomize_trainable(model)
    return model


def wrapped(family, method, *, train_connector=False):
    model, what = add_baseline(tiny_model(family, num_layers=1), method, train_connector=train_connector)
    assert what.startswith("HF PEFT")
    randomize_trainable(model)
    return model


def loss_of(model, family):
    with torch.no_grad():
        return model.eval()(**tiny_batch(family)).loss


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family, name, train_connector", CASES)
def test_hf_peft_loads_ours(family, name, train_connector, tmp_path):
    model = added(family, METHODS[name], train_connector=train_connector)
    save_peft(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = PeftModel.from_pretrained(tiny_model(family, num_layers=1), tmp_path / "adapter")
    torch.testing.assert_close(loss_of(loaded, family), loss_of(model, family))

    stored = load_file(tmp_path / "adapter" / TENSORS)
    seen = hf_tensors(loaded)
    unread = stored.keys() - seen.keys()
    assert {key.split(".")[0] for key in unread} == ({"prompt_encoder"} if name == "prefix-projection" else set())
    assert seen.keys() <= stored.keys() and all(torch.equal(stored[key], value) for key, value in seen.items())


@pytest.mark.parametrize("family, name, train_connector", CASES)
def test_we_load_hf_pefts(family, name, train_connector, tmp_path):
    model = wrapped(family, METHODS[name], train_connector=train_connector)
    model.save_pretrained(tmp_path)
    loaded = load_peft(tiny_model(family, num_layers=1), tmp_path)
    torch.testing.assert_close(loss_of(loaded, family), loss_of(model, family))
    # Of a projected prefix HF PEFT keeps the materialised one, and LoRA-FA is a LoRA to it.
    if name not in ("prefix-projection", "lora-fa"):
        sizes = [sum(parameter.numel() for parameter in trained(each).values()) for each in (model, loaded)]
        assert sizes[0] == sizes[1]
    save_peft(loaded, tmp_path / "again")
    again, stored = load_file(tmp_path / "again" / TENSORS), load_file(tmp_path / TENSORS)
    assert again.keys() == stored.keys() and all(torch.equal(again[key], value) for key, value in stored.items())


def steps(model, family, count):
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    losses = []
    for step in range(count):
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss = model.train()(**tiny_batch(family, seed=step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", [*METHODS, *ADAPTERS, "lora-dropout"])
def test_training_goes_on_from_it_bit_by_bit(name, tmp_path):
    family = "qwen2_vl"
    dropout = LoRA(r=4, alpha=8, dropout=0.4, targets=("q", "k", "v"), independent_masks=True)
    method = {**METHODS, **ADAPTERS, "lora-dropout": dropout}[name]
    model = fuse(added(family, method, train_connector=True))
    steps(model, family, 1)
    save_peft(model, tmp_path / "adapter")
    values = {key: value.clone() for key, value in model.state_dict().items()}
    expected = steps(model, family, 2)

    loaded = fuse(load_peft(tiny_model(family, num_layers=1), tmp_path / "adapter"))
    assert read_carried(loaded).method.place() == read_carried(model).method.place()
    assert {key: value.dtype for key, value in loaded.state_dict().items()} == {k: v.dtype for k, v in values.items()}
    assert all(torch.equal(value, values[key]) for key, value in loaded.state_dict().items())
    assert trained(loaded).keys() == trained(model).keys()
    assert steps(loaded, family, 2) == expected

    # The same folder into a fused model that has gone on training.
    load_peft(model, tmp_path / "adapter")
    assert is_fused(model) and all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert steps(model, family, 2) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_dtype_survives(dtype, tmp_path):
    model = added("llava", LayerNorm(final=True, connector=True), dtype=dtype)
    save_peft(model, tmp_path / "adapter")
    loaded = load_peft(tiny_model("llava", num_layers=1, dtype=dtype), tmp_path / "adapter")
    for name, value in model.state_dict().items():
        assert value.dtype == loaded.state_dict()[name].dtype and torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_have_the_same_shape_of_folder(name, tmp_path):
    model = added("llava", ADAPTERS[name], train_connector=True)
    save_peft(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["peft_type"] == "MMPEFT_ADAPTER" and config["bottleneck"] == 3
    assert config["modules_to_save"] == ["model.multi_modal_projector"]
    layer = "base_model.model.model.language_model.layers.0.mlp.down_proj"
    stored = load_file(tmp_path / "adapter" / TENSORS)
    assert stored[f"{layer}.adapter_down.weight"].shape[0] == stored[f"{layer}.adapter_up.weight"].shape[1] == 3
    loaded = load_peft(tiny_model("llava", num_layers=1), tmp_path / "adapter", trainable=False)
    assert torch.equal(loss_of(loaded, "llava"), loss_of(model, "llava")) and not trained(loaded)


@pytest.mark.parametrize("name", ["ia3", "layernorm-parts", "prefix-projection"])
def test_frozen_after_loading_it_still_saves_whole(name, tmp_path):
    save_peft(added("llava", METHODS[name], train_connector=True), tmp_path / "first")
    loaded = load_peft(tiny_model("llava", num_layers=1), tmp_path / "first", trainable=False)
    assert not trained(loaded)
    save_peft(copy.deepcopy(loaded), tmp_path / "second")
    assert (tmp_path / "first" / TENSORS).read_bytes() == (tmp_path / "second" / TENSORS).read_bytes()
    assert (tmp_path / "first" / CONFIG).read_text() == (tmp_path / "second" / CONFIG).read_text()
    assert trained(load_peft(loaded, tmp_path / "first"))


def test_tied_head_and_embeddings(tmp_path):
    def tied():
        config = tiny_model("llava", num_layers=1).config
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
        return type(tiny_model("llava", num_layers=1))(config)

    base = tied()
    model = add_peft(copy.deepcopy(base), LayerNorm(head=True))
    randomize_trainable(model)
    save_peft(model, tmp_path / "adapter")
    loaded = load_peft(copy.deepcopy(base), tmp_path / "adapter")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    hf = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(loss_of(hf, "llava"), loss_of(model, "llava"))

    stored = load_file(tmp_path / "adapter" / TENSORS)
    stored["base_model.model.lm_head.weight"] += 1
    save_file(stored, tmp_path / "adapter" / TENSORS)
    with pytest.raises(ValueError, match=r"embed_tokens.weight and .*lm_head.weight differ, and are one weight"):
        load_peft(copy.deepcopy(base), tmp_path / "adapter")


def test_a_part_frozen_in_part_is_saved_whole(tmp_path):
    model = added("llava", METHODS["lora"], train_connector=True)
    model.model.multi_modal_projector.linear_1.requires_grad_(False)
    save_peft(model, tmp_path / "adapter")
    loaded = load_peft(tiny_model("llava", num_layers=1), tmp_path / "adapter")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "method",
    [
        *METHODS.values(),
        *ADAPTERS.values(),
        LoRA(r=7, alpha=0.3, targets=("q", "v"), rank_stabilized=True, independent_masks=True),
        LoRA(r=7, alpha=1 / 3, targets=("gate", "up", "down")),
        LayerNorm(connector=True),
    ],
    ids=str,
)
def test_what_add_peft_has_put_on_a_model_is_read_back(method):
    model = tiny_model("qwen2_vl", num_layers=1)
    read = read_carried(add_peft(model, method))
    assert read.method == method and read.parts == ()
    assert {slot.name for slot in read.slots.values() if slot.is_trained} == trained(model).keys()


# PeftModels


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["lora", "ia3", "prefix", "prefix-projection", "layernorm-parts"])
def test_peft_models_are_saved_as_hf_peft_saves_them(name, fused, tmp_path):
    model = wrapped("llava", METHODS[name], train_connector=True)
    model.save_pretrained(tmp_path / "theirs")
    save_peft(fuse(model) if fused else model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / who / TENSORS) for who in ("theirs", "ours"))
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    assert {key.split(".")[0] for key in ours.keys() - theirs.keys()} <= {"prompt_encoder"}
    configs = [json.loads((tmp_path / who / CONFIG).read_text()) for who in ("theirs", "ours")]
    for config in configs:  # HF PEFT before 0.20 writes an unknown name as ""
        config["base_model_name_or_path"] = config["base_model_name_or_path"] or None
    assert configs[0] == configs[1]

    loaded = load_peft(tiny_model("llava", num_layers=1), tmp_path / "ours")
    torch.testing.assert_close(loss_of(loaded, "llava"), loss_of(model, "llava"))
    sizes = [sum(parameter.numel() for parameter in trained(each).values()) for each in (model, loaded)]
    assert sizes[0] == sizes[1]  # the projection too


def test_methods_that_only_hf_peft_has(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True, rank_pattern={"v_proj": 2})
    model = get_peft_model(tiny_model("llava", num_layers=1), config)
    randomize_trainable(model)
    model.get_base_model().model.language_model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        model.get_base_model().model.language_model.norm.weight.fill_(0.25)
    save_peft(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model("llava", num_layers=1), tmp_path / "adapter")
    torch.testing.assert_close(loss_of(loaded, "llava"), loss_of(model, "llava"))


def test_the_active_adapter_is_saved_and_a_trained_other_is_not_lost(tmp_path):
    model = wrapped("llava", METHODS["lora"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    model.set_adapter("second")
    save_peft(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / TENSORS)
    assert len(stored) == 2 and {min(value.shape) for value in stored.values()} == {2}
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(
        ValueError, match=r"lora_A.default.weight is trained, but is no part of the active adapter 'sec"
    ):
        save_peft(model, tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / TENSORS).keys() == stored.keys()


# Configurations


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen_vl"])
@pytest.mark.parametrize("name", [*METHODS, *ADAPTERS])
@pytest.mark.parametrize("parts", [(), ("connector",), ("head",)])
def test_method_of_inverts_hf_config(family, name, parts):
    model = tiny_model(family, num_layers=1)
    config = hf_config(model, (METHODS | ADAPTERS)[name], parts=parts)
    before = copy.deepcopy(config)
    method, parts = method_of(config, model)
    assert config == before == hf_config(model, method, parts=parts)


@pytest.mark.parametrize(
    "config, expected",
    [
        (LoraConfig(r=3, target_modules=["q_proj", "v_proj"], exclude_modules=r".*vision_tower.*"), ("q", "v")),
        (LoraConfig(r=3, target_modules=r".*language_model.*\.(up|down)_proj"), ("up", "down")),
        (
            LoraConfig(r=3, target_modules="all-linear", exclude_modules=r".*(vision|multi_modal).*"),
            ("q", "k", "v", "o", "gate", "up", "down"),
        ),
        (LoraConfig(r=3, target_modules=["o_proj"], layers_to_transform=[0, 1], layers_pattern="layers"), ("o",)),
    ],
)
def test_targets_are_resolved_as_hf_peft_does(config, expected):
    method, parts = method_of(config, tiny_model("llava"))
    assert method == LoRA(r=3, alpha=8, dropout=0.0, targets=expected) and parts == ()


def test_some_layers_are_resolved_as_hf_peft_does():
    config = LoraConfig(r=3, target_modules=["o_proj", "up_proj"], layers_to_transform=1)
    method, _ = method_of(config, tiny_model("llava"))
    assert method == LoRA(r=3, alpha=8, dropout=0.0, targets=("o", "up"), layers=(1,))


def test_parts_named_by_their_modules():
    config = LoraConfig(r=3, target_modules=["o_proj"], modules_to_save=["linear_1", "linear_2", "lm_head"])
    assert method_of(config, tiny_model("llava", num_layers=1))[1] == ("connector", "head")


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(target_modules=["o_proj"], use_qalora=True), "add_peft has no use_qalora=True; PeftModel.from_pre"),
        (VeraConfig(target_modules=["o_proj"], save_projection=False), "add_peft has no save_projection=False"),
        (LoraConfig(target_modules=["o_proj"], bias="all"), "no bias='all'"),
        (LoraConfig(target_modules=["o_proj"], rank_pattern={"o_proj": 2}), "no rank_pattern={'o_proj': 2}"),
        (LoraConfig(target_modules=["o_proj"], alpha_pattern={"o_proj": 2}), "no alpha_pattern"),
        (LoraConfig(target_modules=["o_proj"], trainable_token_indices=[1]), "no trainable_token_indices"),
        (LoraConfig(target_modules=["o_proj"], init_lora_weights="pissa"), "'pissa' changes the base weights"),
        (LoraConfig(target_modules=["q_proj"]), "not model.vision_tower.*q_proj"),
        (
            LoraConfig(target_modules="all-linear"),
            "adapts the decoder's linear layers and norms, not model.multi_modal",
        ),
        (
            LoraConfig(target_modules=r".*language_model.*(0\.self_attn\.o_proj|1\.mlp\.up_proj)"),
            "every role adapted in the same layers, role 'up' of layer 0 is not",
        ),
        (LoraConfig(target_modules=["o_proj"], modules_to_save=["linear_1"]), "expected whole parts .*linear_1.bias"),
        (LoraConfig(target_modules=["no_such_layer"]), "no_such_layer"),
        (IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"]), "output of .*o_proj scaled, got its in"),
        (LNTuningConfig(target_modules=["input_layernorm"]), r"both norms of every layer as targets, got \['input_n"),
        (PrefixTuningConfig(num_virtual_tokens=5, token_dim=8), "expected token_dim=256, got 8"),
        (PrefixTuningConfig(num_virtual_tokens=5, modules_to_save=["linear_1"]), "the model has no linear_1"),
    ],
)
def test_what_add_peft_cannot_express(config, message):
    with pytest.raises(ValueError, match=message):
        method_of(config, tiny_model("llava"))


# What does not fit


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="save_peft: expected a model with PEFT parameters, got a plain Llava"):
        save_peft(tiny_model("llava", num_layers=1), tmp_path / "adapter")
    model = added("llava", METHODS["lora"])
    model.model.vision_tower.requires_grad_(True)
    with pytest.raises(ValueError, match=r"got model.vision_tower.*, which an adapter's folder has no place for"):
        save_peft(model, tmp_path / "adapter")
    model.model.vision_tower.requires_grad_(False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"it also holds notes.txt"):
        save_peft(model, tmp_path)
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        save_peft(model, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def edit(change):
    def change_folder(folder):
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return change_folder


def setting(**changes):
    def change_folder(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change_folder


Q_DOWN = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (edit(lambda tensors: tensors.pop(Q_DOWN)), f"expected a tensor {Q_DOWN}, there is none"),
        (edit(lambda tensors: tensors.update(odd=torch.ones(1))), "expected 8 tensors, it also has odd"),
        (
            edit(lambda tensors: tensors.update({Q_DOWN: torch.ones(3, 256)})),
            r"q_proj.lora_A.weight as \[4, 256\], got \[3, 256\]",
        ),
        (
            edit(lambda tensors: tensors.update({Q_DOWN: torch.full((4, 256), 1 / 3, dtype=torch.float64)})),
            "is torch.float64 and would be rounded to torch.float32; load the base model in torch.float64",
        ),
        (lambda folder: (folder / CONFIG).unlink(), "expected an adapter in .*, it cannot be read: .*adapter_config"),
        (lambda folder: (folder / CONFIG).write_text("{"), "expected valid JSON, but Expecting"),
        (
            lambda folder: (folder / CONFIG).write_text('{"peft_type": "NEW"}'),
            "expected a peft_type .*, got 'NEW'",
        ),
        (
            lambda folder: (folder / CONFIG).write_text('{"peft_type": "LORA", "unused": null, "new": 2}'),
            "adapter_config.json has new=2, which HF PEFT .* does not know",
        ),
        (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "expected JSON of few levels"),
        (lambda folder: (folder / CONFIG).write_text("[]"), r"expected an object, got \[\]"),
        (setting(peft_type=["LORA"]), r"expected a peft_type among .*, got \['LORA'\]"),
        (setting(r="4"), "r: expected an integer, got '4'"),
        (setting(r=None), "r: expected an integer, got None"),
        (setting(lora_alpha=[9]), r"lora_alpha: expected a number, got \[9\]"),
        (setting(use_rslora="no"), "use_rslora: expected true or false, got 'no'"),
        (setting(target_modules=3), "target_modules: expected a list of texts or a text or none, got 3"),
        (setting(target_modules=["q", None]), "target_modules: expected a list of texts"),
        (setting(target_modules="("), "target_modules: expected a regular expression, got '\\('"),
        (setting(target_modules="(" * 3000), "target_modules: expected a regular expression"),
        (setting(exclude_modules="*"), r"exclude_modules: expected a regular expression, got '\*'"),
        (setting(layers_to_transform="1"), "layers_to_transform: expected a list of integers"),
        (setting(modules_to_save={"a": 1}), "modules_to_save: expected a list of texts or none"),
        (setting(init_lora_weights={}), "init_lora_weights: expected true or false or a text"),
        (setting(rank_pattern=7), "no rank_pattern=7"),
        (setting(target_modules=r".*(\w+\w*)+\w*-"), "matching .* takes more than 0.5 s of the processor"),
        (
            edit(lambda tensors: tensors.update({Q_DOWN: tensors[Q_DOWN].to(torch.float8_e4m3fn)})),
            "q_proj.lora_A.weight in one of .*, got torch.float8_e4m3fn",
        ),
        (edit(lambda tensors: tensors.update({Q_DOWN: tensors[Q_DOWN].int()})), "got torch.int32"),
        (edit(lambda tensors: tensors[Q_DOWN].fill_(float("nan"))), "q_proj.lora_A.weight holds nan or infinity"),
        (lambda folder: (folder / TENSORS).write_bytes(b"12345678"), "cannot be read"),
        (lambda folder: (folder / TENSORS).unlink(), "cannot be read"),
    ],
)
def test_what_does_not_fit_changes_nothing(spoil, message, tmp_path, monkeypatch):
    monkeypatch.setattr("mmpeft_fast.stored.hf_config._MATCHING_S", 0.5)
    folder = tmp_path / "adapter"
    save_peft(added("llava", METHODS["lora"]), folder)
    spoil(folder)
    plain, carrying = tiny_model("llava", num_layers=1), fuse(added("llava", METHODS["lora"]))
    for model in (plain, carrying):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        flags = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(ValueError, match=message):
            load_peft(model, folder)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
        assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert is_fused(carrying)


@pytest.mark.parametrize(
    "other", [LoRA(r=4, alpha=8, targets="attention"), LoRA(r=4, alpha=9, targets="both"), IA3(), Prefix()]
)
def test_a_model_with_another_method_is_refused(other, tmp_path):
    save_peft(added("llava", METHODS["lora"]), tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"expected an adapter for the model's {type(other).__name__}.*, got LoRA"):
        load_peft(added("llava", other), tmp_path / "adapter")


def test_a_peft_model_loads_by_itself(tmp_path):
    with pytest.raises(ValueError, match=r"got a PeftModel.*; use its load_adapter"):
        load_peft(wrapped("llava", METHODS["lora"]), tmp_path)
