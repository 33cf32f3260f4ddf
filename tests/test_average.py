"""The mean of adapters: by definition, read back by this package and by HF PEFT, and what is refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mmpeft_fast import Adapter, LoRA, VeRA, add_peft, average_peft, cli, load_peft, save_peft
from tests.tiny_models import randomize_trainable, tiny_batch, tiny_model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def client(folder, method, *, factor):
    model = add_peft(tiny_model("llama", num_layers=1), method)
    randomize_trainable(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter *= factor
    save_peft(model, folder)
    return load_file(folder / TENSORS)


@pytest.mark.parametrize("method", [LoRA(r=2), VeRA(r=3), Adapter(bottleneck=2)], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("weights", [None, [1, 2.5]])
def test_the_weighted_mean(tmp_path, method, weights):
    tensors = [client(tmp_path / f"{i}", method, factor=factor) for i, factor in enumerate((1.0, -3.0))]
    share = 0.5 if weights is None else 1 / 3.5
    mean = average_peft([tmp_path / "0", tmp_path / "1"], tmp_path / "mean", weights=weights)
    stored = load_file(tmp_path / "mean" / TENSORS)
    assert stored.keys() == mean.keys() == tensors[0].keys()
    for name, tensor in stored.items():
        expected = share * tensors[0][name].double() + (1 - share) * tensors[1][name].double()
        assert torch.equal(tensor, mean[name]) and tensor.dtype == tensors[0][name].dtype
        torch.testing.assert_close(tensor.double(), expected, rtol=2**-23, atol=0)
    loaded = load_peft(tiny_model("llama", num_layers=1), tmp_path / "mean")
    assert type(loaded.peft_method) is type(method)


def test_of_hf_pefts_folders_by_the_command_line(tmp_path, capsys):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_model("llama", num_layers=1), config)
        randomize_trainable(model)
        model.save_pretrained(tmp_path / str(seed))
    (tmp_path / "mean").mkdir()
    words = [str(tmp_path / "0"), str(tmp_path / "1"), "--weights", "3", "1", "--output", str(tmp_path / "mean")]
    assert cli.main(["average", *words]) == 0 and "the mean of 2 adapters" in capsys.readouterr().out
    with torch.no_grad():
        mean = PeftModel.from_pretrained(tiny_model("llama", num_layers=1), tmp_path / "mean").eval()
        assert mean(**tiny_batch("llama")).loss.isfinite()
    name = next(iter(load_file(tmp_path / "mean" / TENSORS)))
    found = [load_file(tmp_path / folder / TENSORS)[name] for folder in ("0", "1", "mean")]
    torch.testing.assert_close(found[2], 0.75 * found[0] + 0.25 * found[1])


def _rank(folder):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 3}))


def _base(folder):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "some/other-7b"}))


def _changed(change):
    def apply(folder):
        tensors = load_file(folder / TENSORS)
        change(tensors, min(tensors))
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})

    return apply


@pytest.mark.parametrize(
    "damage, said",
    [
        (_rank, "lora_alpha is .* in .*0 and 3 in .*1"),
        (_base, "base model is '.*' in .*0 and 'other-7b' in"),
        (_changed(lambda tensors, name: tensors.pop(name)), r"lora_A.weight is in .*0 alone"),
        (_changed(lambda tensors, name: tensors.update({name: torch.zeros(1, 1)})), r"lora_A.weight as \[2, 256\]"),
        (_changed(lambda tensors, name: tensors[name].fill_(torch.nan)), "expected finite numbers, .*lora_A"),
        (lambda folder: (folder / TENSORS).write_bytes(b"x"), "average: expected an adapter in .*1, it cannot be read"),
    ],
)
def test_folders_that_do_not_fit_are_one_sentence_and_nothing_is_written(tmp_path, capsys, damage, said):
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        client(folder, LoRA(r=2, targets=("q",)), factor=1.0)
    damage(folders[1])
    assert cli.main(["average", *map(str, folders), "--output", str(tmp_path / "mean")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "mean").exists()
    with pytest.raises(ValueError, match=said):
        average_peft(folders, tmp_path / "mean")


@pytest.mark.parametrize(
    "count, weights, said",
    [(1, None, "two folders or more, got 1"), (2, [1], "2 weights, one a folder, got 1"), (2, [1, 0.0], "above 0")],
)
def test_numbers_that_do_not_fit(tmp_path, count, weights, said):
    client(tmp_path / "0", LoRA(r=2, targets=("q",)), factor=1.0)
    with pytest.raises(ValueError, match=said):
        average_peft([tmp_path / "0"] * count, tmp_path / "mean", weights=weights)


def test_what_else_lies_in_the_output_is_not_replaced(tmp_path):
    client(tmp_path / "0", LoRA(r=2, targets=("q",)), factor=1.0)
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"average: .*it also holds notes\.txt"):
        average_peft([tmp_path / "0"] * 2, tmp_path / "mean")
