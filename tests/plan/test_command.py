"""The command line, and the size and speed of a plan at 7B."""

import json
import resource
import time
from pathlib import Path

import pytest

from mmpeft_fast import cli
from mmpeft_fast.plan import papers
from tests.plan.real_step import TINY_IMAGE

KEYS = {
    "trainable_params", "frozen_params", "weight_bytes", "optimizer_bytes", "saved_bytes", "peak_bytes", "model_flops",
    "hardware_flops", "dram_bytes", "launches", "step_ms", "tokens_per_s", "fits", "by_op",
}  # fmt: skip


def run(*words: str) -> int:
    return cli.main(["plan", *map(str, words)])


@pytest.fixture
def tiny(tiny_folders):
    return ["--model", tiny_folders["llava"], "--r", 8, "--seq-len", 80, "--image-size", TINY_IMAGE]


def test_a_plan_at_7b_is_quick_and_small(capsys):
    started = time.process_time()
    assert run("--model", "llava-1.5-7b", "--batch-size", 4, "--device", "h100", "--json") == 0
    assert time.process_time() - started < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20  # KiB
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS
    assert found["trainable_params"] == 319_815_680
    assert found["frozen_params"] == 7_063_427_072
    assert found["optimizer_bytes"] // (8 * 319_815_680) == 1
    assert found["fits"] is True
    assert found["model_flops"] == found["hardware_flops"]
    assert sum(row["flops"] for row in found["by_op"]) == found["hardware_flops"]
    assert sum(row["bytes"] for row in found["by_op"]) == found["dram_bytes"]
    assert sum(row["launches"] for row in found["by_op"]) == found["launches"]
    milliseconds = sum(row["ms"] for row in found["by_op"])
    assert found["device_ms"] == pytest.approx(milliseconds)
    assert max(milliseconds, found["host_ms"]) <= found["step_ms"] <= milliseconds + found["host_ms"]
    assert found["tokens_per_s"] == pytest.approx(4 * 1024 / found["step_ms"] * 1e3)


def test_the_text_has_the_plan_and_the_answers(tiny, capsys):
    assert run(*tiny, "--device", "l40s", "--answers") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("parameters", "largest batch that fits", "longest samples", "what to change first", "data sheet"):
        assert words in out
    assert run(*tiny) == 0
    out = capsys.readouterr().out
    assert "largest batch that fits" not in out and "--answers" in out


def test_checkpointing_separates_model_and_hardware_flops(tiny, capsys):
    assert run(*tiny, "--checkpointing", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hardware_flops"] == found["model_flops"] + found["recompute_flops"]
    assert found["recompute_flops"] > 0


def test_a_sweep_writes_what_it_prints(tiny, tmp_path, capsys):
    files = [tmp_path / name for name in ("s.csv", "s.svg")]
    assert run(*tiny, "--sweep", "batch_size=1,2", "--csv", files[0], "--plot", files[1]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["1", "2"]
    assert files[0].read_text().startswith("batch_size,") and files[1].read_text().startswith("<svg")
    assert run(*tiny, "--sweep", "batch_size=1", "--plot", tmp_path / "s.html", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["batch_size"] == 1
    assert (tmp_path / "s.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "--model: expected a size such as llava-1.5-7b or a local configuration, got none"),
        (["--model", "gpt-5"], "model: expected one of ["),
        (["--model", "llava-1.5-7b", "--device", "tpu"], "device: expected one of ["),
        (["--model", "llava-1.5-7b", "--batch-size", "-1"], "batch_size: expected an integer of 1 to 1048576, got -1"),
        (["--model", "llava-1.5-7b", "--seq-len", "0"], "seq_len: expected an integer of 2 to 1048576, got 0"),
        (["--model", "llava-1.5-7b", "--seq-len", "500"], "seq_len: expected at least 578 tokens for 1 images"),
        (["--model", "llava-1.5-7b", "--method", "no-such-method"], "unknown method 'no-such-method'"),
        (["--model", "llava-1.5-7b", "--method", "ia3", "--r", "4"], "method 'ia3' has no setting ['r']"),
        (["--model", "llava-1.5-7b", "--implementation", "magic"], "implementation: expected one of ["),
        (["--model", "llava-1.5-7b", "--dtype", "fp8"], "dtype: expected one of ["),
        (["--model", "llava-1.5-7b", "--supervised-fraction", "0"], "supervised_fraction: expected a number in (0, 1]"),
        (["--model", "llava-1.5-7b", "--supervised-fraction", "nan"], "supervised_fraction: expected a number in"),
        (["--model", "llava-1.5-7b", "--csv", "x.csv"], "--csv, --plot: expected a --sweep to write, got none"),
        (["--model", "llava-1.5-7b", "--sweep", "batch_size=a"], "batch_size: expected an integer of 1 to 1048576"),
        (["--model", "llava-1.5-7b", "--sweep", "r=8", "--plot", "x.png"], "--plot: expected a file that ends in"),
        (["--model", "llava-1.5-7b", "--sweep", "r=8", "--csv", "no/x.csv"], "--csv: expected a file in an existing"),
        (["--calibrate", "x.json"], "--calibrate: expected --device cuda or cpu, got 'h100'"),
        (["--calibrate", "no/x.json", "--device", "cpu"], "--calibrate: expected a file in an existing folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, sentence, capsys):
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {sentence}") and err.count("\n") == 1


@pytest.mark.parametrize("text", ["{", json.dumps({"model_type": "bert"}), json.dumps({"hidden_size": 3})])
def test_a_configuration_that_cannot_be_built_is_one_sentence(tmp_path, text, capsys):
    (tmp_path / "config.json").write_text(text)
    assert run("--model", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: model: ") and err.count("\n") == 1


@pytest.mark.parametrize("broken", [{"num_attention_heads": 3}, {"hidden_size": -256}, {"rope_parameters": 7}], ids=str)
def test_a_broken_decoder_is_one_sentence(tiny_folders, tmp_path, broken, capsys):
    config = json.loads((Path(tiny_folders["llava"]) / "config.json").read_text())
    config["text_config"] |= broken
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("--model", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: model: ") and err.count("\n") == 1


def test_the_papers_tables(monkeypatch, capsys):
    study, layernorm = papers.study_rows(), papers.layernorm_rows()
    for row in [*study, *layernorm]:
        if row.published is not None:
            digits = len(row.published.split(".")[1])
            assert abs(row.percent - float(row.published)) <= 1.5 * 10**-digits, row
    trained = {(row.size, row.method): row.trained for row in study}
    assert trained["qwen-vl-chat", "lora"] == 224_395_264
    assert trained["qwen-vl-chat", "adapter"] == 201_326_592
    assert trained["qwen-vl-chat", "ia3"] == 483_328
    assert trained["qwen-vl-chat", "lora + connector"] == 224_395_264 + 1_244_659_712

    monkeypatch.setattr(papers, "study_rows", lambda: study)
    monkeypatch.setattr(papers, "layernorm_rows", lambda: layernorm)
    peaks = {"LoRA": 40e9, "LayerNorm": 30e9, "LayerNorm-simp": 20e9}
    monkeypatch.setattr(papers, "memory_peaks", lambda implementation: peaks)
    assert run("papers") == 0
    out = capsys.readouterr().out
    assert "arXiv 2406.05130" in out and "arXiv 2312.11420" in out and "theirs:" in out and "ours:" in out
    assert "25.0" in out  # 1 - 30 / 40
