"""The progress line: what it says and how it estimates."""

import io

import pytest

from mmpeft_fast.study import progress as progress_module
from mmpeft_fast.study.progress import FIRST_GUESS_S, Progress


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_estimate_follows_finished_jobs_of_the_same_kind(clock):
    progress = Progress(["base", "cell", "cell", "cell"], io.StringIO())
    progress.start("a base")
    assert progress.seconds_left() == FIRST_GUESS_S["base"] + 3 * FIRST_GUESS_S["cell"]
    clock.now += 7
    assert progress.seconds_left() == FIRST_GUESS_S["base"] - 7 + 3 * FIRST_GUESS_S["cell"]
    progress.finish()
    progress.start("first cell")
    clock.now += 4
    progress.finish()
    progress.start("second cell")
    assert progress.seconds_left() == 2 * 4
    clock.now += 6  # longer than the first: nothing is left of it, not less than nothing
    assert progress.seconds_left() == 4
    progress.finish()
    progress.start("third cell")
    assert progress.seconds_left() == (4 + 6) / 2
    progress.finish()
    assert progress.seconds_left() == 0


def test_without_a_terminal_each_job_is_one_line(clock):
    stream = io.StringIO()
    progress = Progress(["cell", "cell"], stream)
    for name in ("one", "two"):
        progress.start(name)
        progress.tick()
        clock.now += 65
        progress.finish()
    progress.clear()
    assert stream.getvalue() == "1/2  one  about 0:18 left\n2/2  two  about 1:05 left\n"


def test_on_a_terminal_one_line_is_redrawn_within_its_width(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = Progress(["cell"], stream)
    progress.start("tiny-llava lora fused")
    progress.tick()
    progress.say("a word between")
    text = stream.getvalue()
    assert text.count("\n") == 1 and "a word between\n" in text
    assert all(len(line.removeprefix("\x1b[K")) < 40 for line in text.split("\r"))
