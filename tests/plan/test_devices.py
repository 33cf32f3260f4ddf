"""Device profiles, the roofline on them, and calibration of the machine at hand."""

import dataclasses
import json

import pytest
import torch

from mmpeft_fast.plan import calibrate
from mmpeft_fast.plan.counting import Launch, Work
from mmpeft_fast.plan.devices import DEVICES, Device, device_named, write_device
from mmpeft_fast.plan.roofline import is_compute_bound, step_time, work_seconds

TERA, GIGA = 1e12, 1e9
RATES = dict.fromkeys(("bf16", "fp16", "fp32"), 1 * TERA)
HOST = dict.fromkeys(("forward", "backward", "triton", "graph"), 0.0)


def device(**fields) -> Device:
    plain = {
        "name": "test", "type": "cuda", "memory_bytes": 1 << 30, "bytes_per_s": GIGA, "launch_s": 0.5, "host_s": HOST,
        "gemm": dict.fromkeys(RATES, ((1e6, 1 * TERA), (1e10, 3 * TERA))), "attention": RATES,
        "attention_backward": RATES, "sources": {"all": "this test"},
    }  # fmt: skip
    return Device(**(plain | fields))


def work(**fields) -> Work:
    plain = {
        "part": "gemms", "op": "mm", "phase": "forward", "kind": "gemm", "dtype": torch.bfloat16, "flops": 0,
        "bytes": 0, "launches": 1,
    }  # fmt: skip
    return Work(**(plain | fields))


@pytest.mark.parametrize("name", DEVICES)
def test_profiles_name_their_sources(name):
    profile = device_named(name)
    assert profile.name == name and profile.sources and all(profile.sources.values())
    for dtype in ("bf16", "fp16", "fp32"):
        forward, backward = (profile.attention_rate(dtype, 1e12, backward=b, cudnn=False) for b in (False, True))
        assert profile.gemm_rate(dtype, 1e12) > forward >= backward


def test_faster_cards_are_faster():
    def rate(name):
        return device_named(name).gemm_rate("bf16", 1e12)

    assert rate("l40s") < rate("h100") < rate("h200") < rate("b200")
    assert device_named("a100-40").bytes_per_s < device_named("a100-80").bytes_per_s < device_named("h100").bytes_per_s


def test_rates_are_interpolated_over_the_logarithm_of_size():
    profile = device()
    rates = [profile.gemm_rate("bf16", flops) / TERA for flops in (1.0, 1e6, 1e8, 1e10, 1e15)]
    assert rates == pytest.approx([1, 1, 2, 3, 3])


def test_work_takes_the_longer_of_computing_and_moving():
    profile = device()
    assert work_seconds(work(bytes=2 * GIGA), profile) == pytest.approx(2 + 0.5)
    assert work_seconds(work(flops=6 * TERA, bytes=GIGA, launches=2), profile) == pytest.approx(2 + 1)
    assert is_compute_bound(work(flops=6 * TERA, bytes=GIGA), profile)
    assert not is_compute_bound(work(flops=6 * TERA, bytes=4 * GIGA), profile)


def test_causal_attention_takes_half_its_flops():
    profile = device(launch_s=0.0)
    full, causal = (work(kind="attention", flops=4 * TERA, causal=causal) for causal in (False, True))
    assert work_seconds(full, profile) == pytest.approx(4)
    assert work_seconds(causal, profile) == pytest.approx(2)


def test_a_slow_host_bounds_the_step():
    works = [work(bytes=int(GIGA))] * 3
    quick, slow = (step_time(works, device(launch_s=0.0, host_s=HOST | {"forward": host_s})) for host_s in (0.5, 2.0))
    # The device waits for the first launch, the host for nothing; a slow host's last launch is followed by its work.
    assert (quick.seconds, quick.device_s, quick.host_s) == (pytest.approx(3.5), pytest.approx(3), pytest.approx(1.5))
    assert (slow.seconds, slow.device_s, slow.host_s) == (pytest.approx(7), pytest.approx(3), pytest.approx(6))
    assert (quick.is_host_bound, slow.is_host_bound) == (False, True)


def test_launches_cost_the_host_what_their_kind_does():
    host_s = {"forward": 1.0, "backward": 0.5, "triton": 4.0, "graph": 0.25}
    inside = (Launch("_kernel", 0, is_triton=True), Launch("mm", 0, is_triton=False))
    works = [work(), work(phase="backward"), work(inside=inside, launches=2)]
    found = step_time(works, device(launch_s=0.0, host_s=host_s))
    assert found.host_s == pytest.approx(1.0 + 0.5 + 4.0 + 1.0)
    assert found.graph_s == pytest.approx(4 * 0.25)


def test_a_kernel_takes_its_own_share_of_bytes_and_products():
    call = work(inside=(Launch("_kernel", int(2 * GIGA), is_triton=True, flops=int(6 * TERA)),))
    library = device(launch_s=0.0)
    assert work_seconds(call, library) == pytest.approx(2)
    slow_bytes = dataclasses.replace(library, kernels={"_kernel": {"bytes": 0.25}})
    assert work_seconds(call, slow_bytes) == pytest.approx(8)
    slow_products = dataclasses.replace(library, kernels={"_kernel": {"products": 0.1}})
    assert work_seconds(call, slow_products) == pytest.approx(20)
    assert work_seconds(call, slow_products.with_ideal_kernels) == pytest.approx(2)


def test_a_profile_survives_its_file(tmp_path):
    path = tmp_path / "mine.json"
    write_device(device(), path)
    assert device_named(str(path)) == device()
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"gemm": {}, "name": "x"}), "\x00"])
def test_a_file_that_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="device: expected a profile written by --calibrate"):
        device_named(str(path))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"type": "tpu"}, "type cuda or cpu, got 'tpu'"),
        ({"bytes_per_s": 0.0}, "bytes_per_s to be a positive number, got 0.0"),
        ({"bytes_per_s": float("nan")}, "bytes_per_s: expected a number, got nan"),
        ({"launch_s": -1.0}, "launch_s of at least 0, got -1.0"),
        ({"attention": {}}, "expected rates of bf16"),
        ({"gemm": dict.fromkeys(RATES, ((1e6, -5.0),))}, "gemm bf16 at 1e\\+06 to be a positive number, got -5.0"),
    ],
)
def test_impossible_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        device(**fields)


def test_unknown_device():
    with pytest.raises(ValueError, match=r"device: expected one of .*'h100'.* or a profile's file, got 'h1000'"):
        device_named("h1000")


def test_calibration_measures_this_machine(monkeypatch):
    monkeypatch.setattr(calibrate, "_SIDES", {"cpu": (16, 32)})
    monkeypatch.setattr(calibrate, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(calibrate, "_TOKENS", {"cpu": 16})
    monkeypatch.setattr(calibrate, "_MIN_SECONDS", 1e-4)
    profile = calibrate.calibrate("cpu", "mine")
    assert (profile.name, profile.type) == ("mine", "cpu")
    assert [flops for flops, _ in profile.gemm["fp32"]] == [2.0 * 16**3, 2.0 * 32**3]
    assert all("torch" in source for what, source in profile.sources.items() if what != "memory")
    assert dataclasses.asdict(profile)


def test_calibration_needs_the_device():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="torch sees none"):
        calibrate.calibrate("cuda", "mine")
