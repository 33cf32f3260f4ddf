"""Timing against a simulated device: what is GPU time stays GPU time, whoever comes first and however slow the host."""

import pytest
import torch

from bench.gpu.timing import device_of, timed


class Simulated:
    """A device with a queue: launches run one after another, none before the host has issued it."""

    def __init__(self):
        self.host = self.device = 0.0

    def launch(self, host_ms: float, device_ms: float) -> None:
        self.host += host_ms
        self.device = max(self.device, self.host) + device_ms

    def now(self):
        return self.host / 1e3

    def busy(self, milliseconds):
        self.launch(0.005, milliseconds)

    def mark(self):
        return max(self.device, self.host)

    def between(self, start, end):
        return end - start

    def synchronize(self):
        self.host = max(self.host, self.device)


def functions(device, host_ms=0.1, device_ms=0.02, launches=4):
    def call():
        for _ in range(launches):
            device.launch(host_ms, device_ms)

    return dict.fromkeys(("first", "second", "third"), call)


def test_a_slow_host_adds_nothing_and_nobody_is_first():
    device = Simulated()
    for times in timed(functions(device), device, rounds=5).values():
        assert times.device_ms == pytest.approx([0.08] * 5) and times.host_ms == pytest.approx([0.4] * 5)
        assert set(times.row()) == {"p20_ms", "p50_ms", "p80_ms", "host_ms"}


def test_steps_that_follow_one_another_show_the_slower_of_host_and_device():
    device = Simulated()
    slow_host = timed(functions(device), device, rounds=4, head_start=False)
    assert slow_host["third"].row()["p50_ms"] == pytest.approx(0.4, rel=0.2)
    slow_device = timed(functions(Simulated(), device_ms=0), device, rounds=4, head_start=False)
    assert slow_device["third"].row()["p50_ms"] == pytest.approx(0.0)


def test_a_call_that_was_issued_too_late_is_not_counted():
    device, calls = Simulated(), []

    def hiccups():
        calls.append(len(calls))
        device.launch(8.0 if len(calls) == 5 else 0.1, 0.02)
        device.launch(0.1, 0.02)

    (times,) = timed({"f": hiccups}, device, rounds=8).values()
    assert len(calls) == 10 and len(times.device_ms) == 7 and times.device_ms == pytest.approx([0.04] * 7)
    # A host that is late again and again gets a longer head start.
    growing = iter(range(100))

    def grows():
        device.launch(0.1 + 0.5 * (next(growing) > 4), 0.02)

    (times,) = timed({"f": grows}, device, rounds=8).values()
    assert times.device_ms == pytest.approx([0.02] * len(times.device_ms)) and len(times.device_ms) == 7


def test_compiling_is_no_measure_of_the_head_start():
    device, first = Simulated(), iter([5000.0])
    (times,) = timed({"f": lambda: device.launch(next(first, 0.1), 0.02)}, device, rounds=3).values()
    assert times.device_ms == pytest.approx([0.02] * 3) and device.host < 5010


def test_rounds_end_with_the_time_and_functions_take_turns():
    order, device = [], Simulated()

    def named(name):
        def call():
            order.append(name)
            device.launch(1.0, 1.0)

        return call

    timed({"a": named("a"), "b": named("b")}, device, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert len(timed({"a": named("a")}, device, rounds=100, seconds=0)["a"].device_ms) == 3


def test_a_cpu_is_timed_by_its_clock():
    (times,) = timed({"f": lambda: sum(range(1000))}, device_of("cpu"), rounds=3).values()
    assert all(device_ms >= host_ms > 0 for device_ms, host_ms in zip(*times, strict=True))


def test_a_gpu_is_kept_busy_for_the_milliseconds_that_were_asked_for(monkeypatch):
    """The driver's calls as a simulated device: 2 million cycles a millisecond."""
    device, flushes = Simulated(), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.mark()

        def elapsed_time(self, end):
            return end.at - self.at

    class Buffer:
        def zero_(self):
            flushes.append(device.mark())

    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.launch(0.005, cycles / 2e6))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch, "empty", lambda size, **options: Buffer())
    gpu = device_of("cuda")
    assert not flushes  # a step's peak memory has no part of the clock
    gpu.busy(1.0)
    before = device.device
    gpu.busy(7.0)
    assert device.device - before == pytest.approx(7.0, abs=0.01) and len(flushes) == 2
    monkeypatch.setattr(gpu, "now", device.now)
    for times in timed(functions(device), gpu, rounds=4).values():
        assert times.device_ms == pytest.approx([0.08] * 4)
