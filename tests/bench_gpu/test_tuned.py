"""Tables from rows: what they choose, and that the committed ones are what the code makes of the committed rows."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench.gpu import tuned, tuning
from bench.gpu.tuning import Problem
from mmpeft_fast.ops import dispatch

RESULTS = Path(tuned.__file__).parents[1] / "results"
SMALL, LARGE = Problem("llama-7b", "qkv", 4096, 16), Problem("qwen2.5-7b", "qkv", 4000, 16)
ONE, TWO = ({"block_m": 32, "block_n": n, "num_warps": 4, "num_stages": 2} for n in (64, 128))
EVERYTHING = {f"triton:{op}" for op in dispatch.OPS} | {f"gemm:{way}" for way in ("layout", "triton", "gluon")}
FWD, DX = "fwd bf16 m4096 n16384 k4096 r16", "dx bf16 m4096 n4096 k16384 r1"


def tile_rows(kernel, times, problem, **more):
    sizes = tuning.sizes(kernel, problem)
    return [
        {"section": "tiles", "kernel": kernel, "dtype": "bf16", "call": problem.call, "sizes": sizes, "tile": tile,
         "p20_ms": time, "p50_ms": time, "host_ms": 0.1, **more}
        for tile, time in times
    ]  # fmt: skip


def without_head_start(rows):
    return [{name: value for name, value in row.items() if name != "host_ms"} for row in rows]


@pytest.mark.parametrize("folder", [path.parent.name for path in RESULTS.glob("nvidia-*/rows.jsonl")])
def test_the_committed_table_is_made_of_the_committed_rows(folder):
    path = RESULTS / folder / "rows.jsonl"
    rows = tuned.read_rows(path)
    made = tuned.table(rows, path.relative_to(RESULTS.parents[1]).as_posix())
    assert dispatch.slug(made.device) == folder
    assert json.loads((dispatch.tuned_folder() / f"{folder}.json").read_text()) == json.loads(json.dumps(asdict(made)))
    assert dispatch.table_named(made.device) == made


def test_what_the_h200_has_shown():
    table = dispatch.table_named("NVIDIA H200")
    assert set(table.providers.values()) == {"triton"} and set(table.providers) == set(dispatch.OPS)
    assert {table.gemm[key] for key in table.gemm if key.startswith("dx")} == {"composite"}
    assert set(table.ways) == {"dy_pass"} and all(key.endswith("r128") for key in table.ways["dy_pass"])
    for kernel in ("ddown", "dy_pass"):
        assert len(table.tiles[kernel]) >= 6


def test_committed_rows_say_where_they_come_from_and_name_no_machine():
    for folder in RESULTS.glob("nvidia-*"):
        machine = tuned.read_rows(folder / "rows.jsonl")[0]
        assert machine["section"] == "machine" and {"device", "commit", "versions"} <= set(machine)
        for path in folder.iterdir():
            assert not any(place in path.read_text() for place in ('"/', "/work", "/home", "/root", "/tmp"))


def test_tiles_and_ways_of_rows_are_what_dispatch_reads(tmp_path):
    assert dispatch.bucket(torch.bfloat16, **tuning.sizes("shrink", SMALL)) == "bf16 m4096 k4096 r64"
    rows = tile_rows("shrink", [(None, 2.0), (ONE, 1.5), (TWO, 1.0), ("torch", 9.0)], SMALL)
    rows += tile_rows("shrink", [(None, 2.0), (ONE, 1.0), (TWO, 3.0)], LARGE)
    rows += tile_rows("ddown", [(None, 1.0), (ONE, 0.995)], SMALL)
    library = [("torch", 1.2), ("bare", 1.0), ("layout", 1.1), ("cuda", 0.1)]
    rows += tile_rows("lowrank_gemm fwd", [(None, 1.05), (ONE, 1.0), *library], SMALL)
    rows += tile_rows("lowrank_gemm_gluon fwd", [(None, 0.95), (TWO, 0.9), *library], SMALL)
    rows += tile_rows("lowrank_gemm dx", [(ONE, 0.97), ("torch", 1.0), ("bare", 1.0)], SMALL)
    assert tuned.gemm_ways(rows, EVERYTHING) == {FWD: "gluon", DX: "composite"}
    assert tuned.gemm_ways(rows, EVERYTHING - {"gemm:gluon"})[FWD] == "triton"
    assert tuned.gemm_ways(rows, EVERYTHING - {"gemm:gluon", "gemm:triton"})[FWD] == "layout"
    assert tuned.gemm_ways(rows, set()) == {FWD: "composite", DX: "composite"}
    tiles = {"shrink": {"bf16 m4096 k4096 r64": ONE}}
    bucket = FWD.removeprefix("fwd ")
    assert tuned.tiles(rows, {FWD: "gluon"}) == tiles | {"lowrank_gemm fwd": {bucket: TWO}}
    assert tuned.tiles(rows, {FWD: "triton"}) == tiles | {"lowrank_gemm fwd": {bucket: ONE}}
    assert tuned.tiles(rows, {FWD: "layout", DX: "composite"}) == tiles
    made = tuned.table([{"section": "machine", "device": "NVIDIA H100 80GB HBM3"}, *rows], "x")
    path = tuned.write_table(tmp_path / "tuned", made)
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    before = dispatch.tables()
    with tuned.installed(path.parent):
        assert dispatch.table_named("NVIDIA H100 80GB HBM3") == made
    assert dispatch.tables() == before


def test_a_first_of_a_round_without_a_head_start_decides_nothing():
    rows = tile_rows("shrink", [(None, 2.0), (ONE, 1.5), (TWO, 1.6)], SMALL)
    assert tuned.tiles(rows, {}) == {"shrink": {"bf16 m4096 k4096 r64": ONE}}
    fast_first = tile_rows("shrink", [(ONE, 1.0), (None, 1.0), (TWO, 1.6)], SMALL)
    assert tuned.tiles(without_head_start(fast_first), {}) == {}
    slow_first = tile_rows("shrink", [(ONE, 1.9), (None, 1.6), (TWO, 1.5)], SMALL)
    assert tuned.tiles(without_head_start(slow_first), {}) == {"shrink": {"bf16 m4096 k4096 r64": TWO}}
    # The same size measured twice: the disturbed time of one call does not count.
    twice = tile_rows("dy_pass", [(None, 9.0), (ONE, 0.10), ("torch", 0.25)], Problem("llama-7b", "down", 4096, 128))
    twice += tile_rows("dy_pass", [(None, 9.0), (ONE, 0.10), ("torch", 0.05)], Problem("llama-7b", "o", 4096, 128))
    assert tuned.other_ways(without_head_start(twice)) == {"dy_pass": {"bf16 m4096 n4096 r128": "composite"}}
    assert tuned.other_ways(twice[:3]) == {}


def check(kind, *rests, ok=True, **more):
    return {"section": "checks", "check": f"{kind}: x", "rests": list(rests), "ok": ok, **more}


def test_proven_is_what_every_kind_of_check_passed_for():
    passed = [check(kind, "triton:attention", "cuda:attention") for kind in ("kernel", "op", "model")]
    passed.append(check("gemm", "gemm:gluon"))
    assert tuned.proven(passed) == {"triton:attention", "cuda:attention", "gemm:gluon"}
    assert tuned.proven(passed[2:]) == {"gemm:gluon"}
    assert tuned.proven([]) == set()
    crashed = check("tests", "cuda:attention", ok=False, error="the process died with status -11")
    assert tuned.proven([*passed, crashed]) == {"triton:attention", "gemm:gluon"}
    died = {
        "section": "checks",
        "kind": "op",
        "name": "x",
        "provider": "cuda",
        "error": "the process died with status 1",
    }
    assert tuned.proven([*passed, died]) == {"triton:attention", "gemm:gluon"}
    hung = {"section": "checks", "kind": "gemm", "name": "gluon 3", "provider": "triton", "error": "Died: x"}
    assert tuned.proven([*passed, hung]) == {"triton:attention", "cuda:attention"}
    assert tuned.proven([*passed, {**died, "unfinished": True}]) == tuned.proven(passed)
    slow = check("tests", "cuda:attention", ok=False, unfinished=True, error="ran longer than 60 s")
    assert tuned.proven([*passed, slow]) == {"triton:attention", "cuda:attention", "gemm:gluon"}
    assert tuned.failed([*passed, slow, crashed]) == [crashed]


def test_a_proven_provider_is_chosen_unless_rows_say_it_is_slower():
    def rows(op, times_ms, name="triton"):
        return [
            {"section": "ops", "op": op, "case": str(i), "mode": "eager", "implementation": which, "p20_ms": time}
            for i, own in enumerate(times_ms)
            for which, time in ((name, own), ("torch", 1.0))
        ]

    measured = rows("fused_linear", [0.5, 1.04]) + rows("attention", [0.5, 1.2]) + rows("rms_norm", [1.02])
    measured += rows("fused_linear", [0.4, 0.5], "cuda")
    triton = {f"triton:{op}" for op in dispatch.OPS}
    chosen = {"fused_linear": "cuda", "attention": "torch", "rms_norm": "torch", "linear_cross_entropy": "triton"}
    assert tuned.providers(measured, triton | {"cuda:fused_linear"}) == chosen
    assert tuned.providers(measured, triton)["fused_linear"] == "triton"
    assert tuned.providers(measured, set()) == dict.fromkeys(dispatch.OPS, "torch")
    assert tuned.providers([], triton) == dict.fromkeys(dispatch.OPS, "triton")


def test_the_command_writes_a_table_or_one_sentence(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"section": "machine", "device": "NVIDIA Test GPU"}\n{"section": "til')
    assert tuned.main([str(path), "--out", str(tmp_path / "t")]) == 0
    assert json.loads((tmp_path / "t" / "nvidia-test-gpu.json").read_text())["tiles"] == {}
    path.write_text("no rows\n")
    with pytest.raises(SystemExit) as error:
        tuned.main([str(path), "--out", str(tmp_path / "u")])
    assert error.value.code == 2 and "expected rows of bench.gpu" in capsys.readouterr().err
    assert not (tmp_path / "u").exists()
