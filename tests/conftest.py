"""Shared by all tests: nothing may look for anything on a hub."""

import os
import signal
import sys

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The default run draws the same examples every time; the nightly one (`make nightly`) draws many others.
hypothesis.settings.register_profile("default", max_examples=7, derandomize=True, database=None)
hypothesis.settings.register_profile("nightly", max_examples=84, print_blob=True)
hypothesis.settings.load_profile("default")


def pytest_configure(config):
    """A run in the background ignores Ctrl-C, one under nohup SIGHUP; tests of both need them as they usually are."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="all hostile inputs and kills instead of a few")
    parser.addoption("--case", help="a case, or A-B for several, of tests/test_modifications.py")


@pytest.fixture(autouse=True)
def accelerate_starts_anew():
    """Accelerate keeps one state a process, and transformers tells it a precision through the environment."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
