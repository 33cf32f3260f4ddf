"""`mmpeft-fast profile` from its words to its files."""

import json
import subprocess
import sys

import pytest
import torch

from mmpeft_fast import cli
from mmpeft_fast.profiling import run as run_module
from mmpeft_fast.profiling.rows import Row
from mmpeft_fast.profiling.session import profile
from mmpeft_fast.profiling.storages import ROLES

TINY = ["profile", "--model", "tiny-llava", "--layers", "2", "--seq-len", "96", "--steps", "2", "--device", "cpu"]
NO_ROOFLINE = ["--device-profile", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile of peft and fused, written once."""
    output = tmp_path_factory.mktemp("profiles") / "lora"
    words = [*TINY, "--implementation", "peft", "fused", "--set", "r=7", "--device-profile", "cpu"]
    assert cli.main([*words, "--output", str(output)]) == 0
    return output


def test_the_folder_has_traces_numbers_and_a_report(folder):
    assert {path.name for path in folder.iterdir()} == {
        "trace_peft.json", "trace_fused.json", "profile.json", "report.html",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["lora"]
    for name in ("peft", "fused"):
        events = json.loads((folder / f"trace_{name}.json").read_text())["traceEvents"]
        assert any(event.get("name") == "aten::mm" for event in events)
        assert not any(event.get("name", "").startswith("mmpeft_fast ") for event in events)  # a run without tracing


def test_the_numbers_add_up(folder):
    found = json.loads((folder / "profile.json").read_text())
    assert found["request"]["model"] == "tiny-llava" and found["request"]["settings"] == {"r": 7}
    assert found["device_profile"]["name"] == "cpu"
    implementations = found["implementations"]
    assert list(implementations) == ["peft", "fused"]
    for one in implementations.values():
        assert len(one["times_s"]) == 2 and all(seconds > 0 for seconds in one["times_s"])
        for rows in (one["by_part"], one["by_op"]):
            for name in ("launches", "flops", "bytes"):
                assert sum(row[name] for row in rows) == one[name]
            assert sum(row["seconds"] for row in rows) == pytest.approx(one["op_seconds"])
        assert sum(one["peak_by_role"].values()) == one["peak_bytes"]
        assert list(one["peak_by_role"]) == list(ROLES)
        assert max(sum(point) for point in one["timeline"]["bytes_by_role"]) == one["peak_bytes"]
        assert [phase for _, phase in one["timeline"]["phases"]] == ["forward", "backward", "optimizer"]
        assert one["roofline_fraction"] > 0
    peft, fused = implementations.values()
    assert fused["launches"] < peft["launches"] and fused["flops"] < peft["flops"]
    ratios = found["ratios"]["fused/peft"]
    assert ratios["launches"] == fused["launches"] / peft["launches"]
    assert ratios["time"] == fused["seconds"] / peft["seconds"]
    assert ratios["peak"] == fused["peak_bytes"] / peft["peak_bytes"]


def test_the_report_is_self_contained_and_says_the_numbers(folder):
    text = (folder / "report.html").read_text()
    found = json.loads((folder / "profile.json").read_text())
    assert "<script" not in text and "http" not in text and "src=" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert f"{found['ratios']['fused/peft']['launches']:.2f}×" in text
    assert text.count("<svg") == 3  # bars, and memory of two
    assert f"peak {found['implementations']['peft']['peak_bytes'] / 2**20:.1f} MiB" in text


def test_json_is_what_the_folder_has(tmp_path, capsys):
    words = [*TINY, *NO_ROOFLINE, "--what", "op", "--implementation", "frozen", "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert printed == json.loads((tmp_path / "out" / "profile.json").read_text())
    assert printed["ratios"] == {} and printed["device_profile"] is None
    assert printed["implementations"]["frozen"]["roofline_fraction"] is None
    assert "profile: round 2 of 2" in err and "profile: tracing frozen" in err
    # An earlier profile is replaced.
    assert cli.main([*words, "--what", "layer"]) == 0
    assert "ops ms by part" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "profile.json").read_text())["request"]["what"] == "layer"


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--model", "gpt"], "model: expected one of"),
        (["--method", "qlora"], "unknown method 'qlora'; expected one of"),
        (["--set", "rank=3"], "has no setting ['rank']"),
        (["--batch-size", "-1"], "batch_size: expected an integer of 1 to 1048576, got -1"),
        (["--seq-len", "-7"], "seq_len: expected an integer of 2 to 1048576, got -7"),
        (["--seq-len", "33"], "seq_len: expected at least"),
        (["--layers", "33"], "layers: expected 1 to 4 for tiny-llava, got 33"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--supervised-fraction", "2"], "supervised_fraction: expected a number in (0, 1], got 2.0"),
        (["--implementation", "eager"], "implementation: expected one of"),
        (["--implementation", "peft", "peft"], "each once"),
        (["--what", "kernel"], "what: expected one of ['step', 'layer', 'op'], got 'kernel'"),
        (["--dtype", "int8"], "dtype: expected one of"),
        (["--device", "tpu"], "--device: expected auto, cpu or cuda, got 'tpu'"),
        (["--device-profile", "h1000"], "device: expected one of"),
        (["--what", "layer", "--method", "prefix"], "HF PEFT keeps the prefix in the key/value cache"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(wrong, said, tmp_path, capsys):
    words = [*TINY, "--output", str(tmp_path / "out")]
    if "--device-profile" not in wrong:
        words += NO_ROOFLINE
    assert cli.main([*words, *wrong]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(errors) == 1 and said in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(tmp_path, capsys):
    assert cli.main([*TINY, "--output", str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "expected a CUDA device for cuda, torch sees none" in capsys.readouterr().err


def test_what_is_there_is_not_lost(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for name, said in (("file", "got the file"), ("folder", "new or empty folder"), ("file/below", "below the file")):
        assert cli.main([*TINY, *NO_ROOFLINE, "--output", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("when", ["run", "write"])
def test_an_interrupt_leaves_nothing_half_written(when, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if when == "run":
        monkeypatch.setattr(run_module, "_traced", interrupt)
    else:
        monkeypatch.setattr("mmpeft_fast.profiling.folder.report_html", interrupt)
    words = [*TINY, *NO_ROOFLINE, "--what", "op", "--implementation", "fused", "--output", str(tmp_path / "out")]
    assert cli.main(words) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_waits_for_no_heavy_import():
    code = (
        "import sys, mmpeft_fast.profiling.command\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_implementations_run_in_turn():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in ("peft", "fused")}
    times = run_module.interleaved(functions, rounds=3)
    assert order == ["peft", "fused"] * 3
    assert {name: len(values) for name, values in times.items()} == {"peft": 3, "fused": 3}


def test_the_traced_run_in_the_middle_is_shown(monkeypatch):
    def row(seconds: float) -> Row:
        return Row(
            part="gemms", op="mm", phase="forward", calls=1, launches=1, seconds=seconds, flops=0, bytes=0,
            ideal_seconds=None,
        )  # fmt: skip

    seconds = iter((3.0, 1.0, 2.0))

    def profiled(one, roofline):
        found = profile()
        found.rows = [row(next(seconds))]
        return found

    monkeypatch.setattr(run_module, "_profiled", profiled)
    one = run_module.Subject(torch.nn.Linear(1, 1), "nobody", lambda: torch.ones(1).sum(), "inputs")
    assert run_module._traced("peft", one, [1.0], None).whole.seconds == 2.0


@pytest.mark.parametrize(
    "name, memory_gib, expected",
    [
        ("NVIDIA H100 80GB HBM3", 80, "h100"),
        ("NVIDIA H200", 141, "h200"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", 24, None),
        ("NVIDIA GH200 480GB", 96, None),
        ("NVIDIA H100 PCIe", 80, None),
        ("cpu", 80, None),
    ],
)
def test_gpus_are_known_by_name_and_memory(name, memory_gib, expected):
    found = run_module.known_gpu(name, memory_gib * 2**30)
    assert (None if found is None else found.name) == expected
