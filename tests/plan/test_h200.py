"""The planner is held to whole steps that were measured on an NVIDIA H200, at commit d880b0b.

A fused step is predicted from what it launched then and what its kernels reached then (`fused_at_d880b0b.json`: the
planner's works at that commit, shares of the profile in section "extra" and of the default tiles in section "tiles"):
today's kernels are others, and so is their step. The CUDA provider's step has no plan.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.gpu.rates import reached
from mmpeft_fast.ops import dispatch
from mmpeft_fast.plan.counting import Launch, Work
from mmpeft_fast.plan.devices import device_named
from mmpeft_fast.plan.prediction import plan
from mmpeft_fast.plan.request import Request
from mmpeft_fast.plan.roofline import step_time, work_seconds

HERE = Path(__file__).parent
ROWS = [HERE.parents[1] / "bench" / "results" / "nvidia-h200" / name for name in ("rows.jsonl", "peers.jsonl")]
# What a fused step launched at that commit, and what its kernels reached: both change with the kernels.
FUSED = json.loads((HERE / "fused_at_d880b0b.json").read_text())
STOCK = ("frozen", "peft", "peft_bf16")
PEERS = {"A": ("llama-2-7b", 0.05), "B": ("qwen2-7b", 1.0)}  # model, share of labelled tokens


def measured() -> list[dict]:
    rows = [json.loads(line) for path in ROWS for line in path.read_text().splitlines()]
    steps = [row for row in rows if row.get("section") == "steps" and "p50_ms" in row]
    peers = [row | {"implementation": row["peer"]} for row in rows if row.get("peer") in STOCK and "p50_ms" in row]
    return [row for row in (*steps, *peers) if row["implementation"] in (*STOCK, "triton")]


def test_every_row_is_there():
    kinds = Counter(row["implementation"] for row in measured())
    assert kinds == {"frozen": 2, "peft": 2, "peft_bf16": 4, "triton": 2}


def row_id(row: dict) -> str:
    return f"{row['implementation']} {row.get('name', row.get('setting'))} {row.get('run', '')}".strip()


def request(row: dict) -> Request:
    if "peer" in row:
        model, labelled = PEERS[row["setting"]]
        shape = {"model": model, "batch_size": row["batch"], "seq_len": row["seq"], "supervised_fraction": labelled}
    else:
        shape = {
            "model": row["size"], "batch_size": row["batch_size"], "seq_len": row["length"],
            "supervised_fraction": row["supervised"], "images": int(row["num_image_tokens"] > 0),
        }  # fmt: skip
    name = row["implementation"]
    return Request(
        **shape, settings={"r": row["r"], "dropout": row["dropout"]}, optimizer="fused",
        implementation={"peft_bf16": "peft", "triton": "fused"}.get(name, name), fp32_adapters=name != "peft_bf16",
    )  # fmt: skip


PLANS: dict[Request, object] = {}


def planned(row: dict):
    wanted = request(row)
    key = str(wanted)
    if key not in PLANS:
        PLANS[key] = plan(wanted, device_named("h200"))
    return PLANS[key]


@pytest.mark.parametrize("row", [row for row in measured() if row["implementation"] != "triton"], ids=row_id)
def test_a_stock_step_takes_what_it_took(row):
    assert planned(row).time.seconds * 1e3 == pytest.approx(row["p50_ms"], rel=0.10)


def works_at(name: str) -> list[Work]:
    found = []
    for fields in FUSED["steps"][name]["works"]:
        inside = tuple(Launch(*launch) for launch in fields["inside"])
        found.append(Work(**fields | {"dtype": getattr(torch, fields["dtype"]), "inside": inside}))
    return [found[i] for i in FUSED["steps"][name]["order"]]


@pytest.mark.parametrize("row", [row for row in measured() if row["implementation"] == "triton"], ids=row_id)
def test_a_fused_step_takes_what_it_took(row):
    device = dataclasses.replace(device_named("h200"), kernels=FUSED["kernels"])
    assert step_time(works_at(row["name"]), device).seconds * 1e3 == pytest.approx(row["p50_ms"], rel=0.10)


@pytest.mark.parametrize("row", measured(), ids=row_id)
def test_memory_is_what_it_was(row):
    """Kept bytes of a fused step may only fall; peaks are held where the row is the first of its process (a model of an
    earlier row stays in the others)."""
    counts = planned(row).counts
    if "saved_mib" in row:
        kept = counts.saved_bytes / 2**20
        assert kept <= 1.03 * row["saved_mib"]
        assert row["implementation"] == "triton" or kept >= 0.97 * row["saved_mib"]
    is_first = (row["implementation"], row.get("run")) in (("frozen", 1), ("triton", 2)) and row["r"] == 128
    peak_mib = row.get("peak_mib") or (row["peak_allocated_mib"] if is_first else None)
    if peak_mib and row["implementation"] != "triton":
        assert counts.peak_bytes / 2**20 == pytest.approx(peak_mib, rel=0.03)


def test_replayed_layers_take_what_they_took():
    """Rows of a later commit, with today's kernels (those that were not timed alone taken as good as the library's)."""
    rows = [json.loads(line) for line in (ROWS[0].parent / "steps.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if row.get("implementation") == "graphs" and row["mode"] == "step")
    found = plan(request(row | {"implementation": "triton"}), device_named("h200")).time
    assert found.graph_s * 1e3 == pytest.approx(row["p50_ms"], rel=0.10)


def test_a_better_kernel_makes_a_step_faster_by_its_entry_alone():
    device = device_named("h200")
    works = works_at("llava-1.5-7b lora r128 4x700")
    better = {**FUSED["kernels"], "_prologue_backward_kernel": {"bytes": 0.8, "products": 0.5}}
    now, then = (step_time(works, dataclasses.replace(device, kernels=each)) for each in (FUSED["kernels"], better))
    assert then.device_s < now.device_s - 0.05
    assert step_time(works, device.with_ideal_kernels).device_s <= then.device_s
    kernel = next(work for work in works if work.op == "prologue_backward rms_norm")
    assert work_seconds(kernel, dataclasses.replace(device, kernels=better)) < work_seconds(kernel, device)


def test_rates_of_todays_kernels_are_what_the_rows_say():
    rows = [json.loads(line) for line in ROWS[0].read_text().splitlines()]
    device = device_named("h200")
    for kernel, shares in reached(rows, dispatch.table_named(device.gpu_name), device).items():
        assert {name: device.kernels[kernel][name] for name in shares} == shares


def test_tuned_tiles_make_todays_step_faster():
    """No row has it yet: between what was measured with default tiles and what kernels at their best would take."""
    row = next(row for row in measured() if row["implementation"] == "triton" and row["r"] == 128)
    found = planned(row)
    assert found.ideal_time.device_s < found.time.device_s
    assert found.time.seconds * 1e3 < row["p50_ms"]


def test_a_usual_host_bounds_no_step_of_a_slow_one():
    works = works_at("llava-1.5-7b lora r128 4x700")
    slow, usual = (step_time(works, device_named(name)) for name in ("h200", "h200-usual-host"))
    assert slow.device_s == usual.device_s
    assert usual.host_s == pytest.approx(slow.host_s / 2.5)
    assert usual.device_s <= usual.seconds <= slow.seconds
