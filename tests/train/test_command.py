import argparse
import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from mmpeft_fast import METHODS, BranchPlacement, Method, Placement
from mmpeft_fast.train import command
from mmpeft_fast.train.command import parse_settings
from mmpeft_fast.train.log import LOG


@dataclass(frozen=True, kw_only=True)
class ParallelBranch(Method):
    rank: int = 4

    def place(self, roles=()):
        return Placement(branches={"up": BranchPlacement(position="parallel", rank=self.rank, activation="tanh")})


@pytest.fixture
def call(data, tmp_path):
    """Run the command on the small data set with some options changed; None drops one."""

    def call(*flags, **options):
        defaults = {
            "model": "tiny-llava",
            "method": "lora",
            "set": "r=4",
            "data": data[0],
            "images": data[1],
            "output": tmp_path / "out",
            "dtype": "fp32",
            "global-batch-size": 4,
            "batch-size": 2,
            "max-steps": 2,
            "learning-rate": 1e-3,
        }
        words = [*flags, "--cpu", "--no-progress"]
        for name, value in {**defaults, **options}.items():
            if value is not None:
                words += [f"--{name}", str(value)]
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return command.run(parser.parse_args(words))

    return call


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / LOG).read_text().splitlines()]


def test_trains_evaluates_and_says_so(call, data, tmp_path, capsys):
    assert call("--train-connector", **{"eval-data": data[0], "eval-images": data[1], "eval-limit": 2}) == 0
    out = capsys.readouterr().out
    assert "tiny-llava, lora (fused), fp32:" in out and "8 samples" in out and "done: step 2" in out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["steps"], result["checkpoint"]) == (2, "checkpoint-000002")
    assert 0 <= result["accuracy"] <= 1
    assert result["loss_last"] == losses(tmp_path / "out")[-1]


def test_resume_continues_to_the_same_losses(call, tmp_path):
    call(**{"max-steps": 3, "save-every": 1, "keep-checkpoints": 1})
    call(**{"max-steps": 3, "save-every": 1, "output": tmp_path / "again"})
    last = tmp_path / "again" / "checkpoint-000003"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert call("--resume", **{"max-steps": 3, "save-every": 1, "output": tmp_path / "again"}) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "out")


def test_the_adapter_is_written_in_hf_pefts_format(call, tmp_path):
    assert call("--train-connector", "--no-fp32-adapters", dtype="bf16") == 0
    trained = load_file(tmp_path / "out" / "checkpoint-000002" / "trainable.safetensors")
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == len(trained) > 4
    for name, value in trained.items():
        name = name.replace(".branches.0.down", ".lora_A.weight").replace(".branches.0.up", ".lora_B.weight")
        assert torch.equal(adapter[f"base_model.model.{name}"], value) and value.dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["modules_to_save"]) == ("LORA", 4, ["model.multi_modal_projector"])


def test_easy_vqa_is_built_in(call, tmp_path):
    assert call(data="easy-vqa", images=None, limit=8, **{"max-steps": 1}) == 0
    assert len(losses(tmp_path / "out")) == 1


@pytest.mark.parametrize("implementation", ["fused", "peft"])
def test_both_implementations_train_in_bf16(call, tmp_path, implementation):
    assert call("--no-fp32-adapters", implementation=implementation, dtype="bf16", **{"max-steps": 1}) == 0
    assert losses(tmp_path / "out")[0] > 0
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lara"}, "lara"),
        ({"set": "r=0"}, "r"),
        ({"set": "dropout=1"}, "dropout"),
        ({"set": "rank=3"}, "rank"),
        ({"set": "r"}, "--set: expected NAME=VALUE, got 'r'"),
        ({"set": "targets=nose"}, "nose"),
        ({"data": "nowhere.json"}, "nowhere.json: expected a conversation file"),
        ({"images": None}, "expected no 'image', as no image folder was given"),
        ({"data": "easy-vqa"}, "--images: expected none, as easy-vqa brings its own"),
        ({"model": "no/such/model/here"}, "no/such/model/here"),
        ({"learning-rate": -1}, "learning_rate: expected a number above 0, got -1.0"),
        ({"batch-size": 3}, "global_batch_size: expected a multiple of batch_size 3, got 4"),
        ({"tracker": "crayon"}, "tracker: expected none or one of"),
        ({"max-length": 10}, "max_length 10"),
        ({"limit": 0}, "limit: expected at least 1 sample, got 0"),
        ({"set": "targets=1"}, "LoRA.targets: expected a text or a list of texts, got 1"),
        ({"set": "targets=null"}, "LoRA.targets: expected a text or a list of texts, got None"),
        ({"set": "rank_stabilized=no"}, "LoRA.rank_stabilized: expected true or false, got 'no'"),
        ({"set": "r=99999999999"}, "LoRA.r: expected an integer of 1 to 65536, got 99999999999"),
        ({"set": f"r={'9' * 5000}"}, "expected a number, true, false, null or a word, got '999"),
        ({"set": f"r={'[' * 5000}"}, "expected a number, true, false, null or a word, got '[[["),
        ({"output": "/"}, "expected a folder of its own for the output, got the root of the file system"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(call, tmp_path, options, message):
    with pytest.raises(ValueError) as caught:
        call(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["result.json", "adapter"])
def test_what_stands_in_the_place_of_a_result_is_found_before_training(call, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{name}.*(something else is in its place|it also holds mine.txt)"):
        call()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_another_runs_adapter_is_not_replaced(call, tmp_path):
    call(**{"max-steps": 1, "output": tmp_path / "first"})
    (tmp_path / "first" / "adapter").rename((tmp_path / "out").with_name("adapter"))
    (tmp_path / "out").mkdir()
    (tmp_path / "adapter").rename(tmp_path / "out" / "adapter")
    with pytest.raises(ValueError, match="adapter: expected a new folder for the adapter, there is one already"):
        call()


def test_images_outside_their_folder_are_taken_only_where_asked(call, data, tmp_path):
    entries = json.loads(data[0].read_text())
    (tmp_path / "images").mkdir()
    for name in (str(data[1] / "0.png"), f"../{data[1].name}/0.png"):
        (tmp_path / "data.json").write_text(json.dumps([{**entry, "image": name} for entry in entries]))
        options = {"data": tmp_path / "data.json", "images": data[1], "max-steps": 1}
        with pytest.raises(ValueError, match=r"entry 0 .*: expected 'image' inside the image folder, got "):
            call(**options)
    assert call("--images-anywhere", **options) == 0


def test_hf_prefix_tuning_refuses_gradient_checkpointing(call, tmp_path):
    with pytest.raises(ValueError, match="--gradient-checkpointing: expected --implementation fused"):
        call("--gradient-checkpointing", method="prefix", set=None, implementation="peft")
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_found_before_training(call, data, tmp_path):
    entries = json.loads(data[0].read_text())
    entries[-1]["image"] = "bad.png"
    (tmp_path / "images").mkdir()
    for image in data[1].glob("*.png"):
        (tmp_path / "images" / image.name).symlink_to(image)
    (tmp_path / "images" / "bad.png").write_text("no image")
    (tmp_path / "bad.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"bad\.json entry 7 \(id 7\): expected a readable image"):
        call(data=tmp_path / "bad.json", images=tmp_path / "images")
    assert not (tmp_path / "out").exists()


def test_settings():
    parsed = parse_settings(["r=64", "dropout=0.5", "flag=true", "targets=q,v", "init=bert", "none=null"])
    assert parsed == {"r": 64, "dropout": 0.5, "flag": True, "targets": ("q", "v"), "init": "bert", "none": None}


def test_a_registered_method_trains_and_resumes(call, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "branch", ParallelBranch)
    own = {"method": "branch", "set": "rank=2", "learning-rate": None}
    call(**own, **{"max-steps": 3, "output": tmp_path / "whole"})
    call(**own, **{"max-steps": 3, "save-every": 1, "keep-checkpoints": 3})
    for number in (2, 3):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{number:06d}")
    (tmp_path / "out" / "result.json").unlink()
    shutil.rmtree(tmp_path / "out" / "adapter")
    call("--resume", **own, **{"max-steps": 3, "save-every": 1, "keep-checkpoints": 3})
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["method"]) == ("MMPEFT_METHOD", "ParallelBranch")
