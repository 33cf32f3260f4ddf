"""pytest plugin that runs somebody else's tests with every eligible model fused, and notes what came out.

Loaded with `-p fusing` by `tests.peers`. It changes libraries while those tests run, never the tests: a model is fused
when it is first called, generates or is saved, and again when modules were added since. What cannot be fused runs as it
was. Nothing is asked of a network. On both sides decoders of the known families are built with SiLU, where a suite asks
for another activation: with that alone they are eligible.

    --peers-results FILE    appends a JSON line a test: id, outcome, reason, eligible (calls of a model that `fuse`
                            knows), fused (layers that ran fused)
    --peers-fuse            fuses; without it nothing is
    --peers-done FILE       ids, one a line, that are left out
    --peers-only FILE       ids, one a line; others are left out
"""

import functools
import json
import signal
import threading
import warnings
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
import transformers
from huggingface_hub import set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils._http import default_client_factory
from torch import nn

import mmpeft_fast
from mmpeft_fast.layers import decoder
from mmpeft_fast.models import family_of

# What a suite may do first with a model that it has made.
_ENTRANCES = (
    (nn.Module, "__call__"),
    (transformers.GenerationMixin, "generate"),
    (transformers.PreTrainedModel, "save_pretrained"),
    (peft.PeftModel, "generate"),
    (peft.PeftModel, "save_pretrained"),
)
# Text decoders of the families that `fuse` knows.
_TEXT_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
_MODELS = (transformers.PreTrainedModel, peft.PeftModel)
_SECONDS = 300
_REASON = 400  # characters


def pytest_addoption(parser):
    group = parser.getgroup("peers")
    group.addoption("--peers-results", help="appends a JSON line a test")
    group.addoption("--peers-fuse", action="store_true", help="fuses every eligible model")
    group.addoption("--peers-done", help="a file of test ids that are left out")
    group.addoption("--peers-only", help="a file of test ids; others are left out")


def pytest_configure(config):
    set_client_factory(_client_that_refuses)
    plugin = _Peers(config)
    config.pluginmanager.register(plugin, "peers")
    config.add_cleanup(plugin.close)


def _client_that_refuses():
    """The hub's client for suites that switch its offline mode off: the library then looks into its cache at once."""
    client = default_client_factory()
    client.event_hooks = {"request": [_refuse]}
    return client


def _refuse(request):
    raise OfflineModeIsEnabled(f"no network here: {request.url}")


class _Entrances:
    """Sees models at `_ENTRANCES`, and fuses them if asked to. counts: calls of models that `fuse` knows ("eligible"),
    and layers that ran fused ("fused")."""

    def __init__(self, is_fusing):
        self.counts = Counter()
        self._is_fusing = is_fusing
        self._is_inside = False
        self._thread = threading.get_ident()
        self._undo = []
        for owner, name in _ENTRANCES:
            self._replace(owner, name, self._entrance(getattr(owner, name)))
        self._replace(transformers.PreTrainedModel, "__init__", _with_silu(transformers.PreTrainedModel.__init__))
        self._replace(decoder, "fused_linear", self._counting(decoder.fused_linear))

    def _replace(self, owner, name, function):
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)

    def close(self):
        for owner, name, function in reversed(self._undo):
            setattr(owner, name, function)

    def _counting(self, function):
        @functools.wraps(function)
        def counting(*args, **kwargs):
            if not torch.compiler.is_compiling():
                self.counts["fused"] += kwargs.get("prologue") == "swiglu"  # once a layer
            return function(*args, **kwargs)

        return counting

    def _entrance(self, function):
        @functools.wraps(function)
        def entrance(model, *args, **kwargs):
            is_first = not (torch.compiler.is_compiling() or self._is_inside) and isinstance(model, _MODELS)
            if not is_first or threading.get_ident() != self._thread:
                return function(model, *args, **kwargs)
            self._is_inside = True
            try:
                if _is_eligible(model):
                    self.counts["eligible"] += 1
                    if self._is_fusing:
                        _fuse(model)
                return function(model, *args, **kwargs)
            finally:
                self._is_inside = False

        return entrance


def _is_eligible(model):
    try:
        family_of(model)
    except (ValueError, AttributeError):
        return False
    return True


def _fuse(model):
    if model.__dict__.get("_peers_seen") == _modules_of(model):
        return
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        mmpeft_fast.fuse(model)
    model.__dict__["_peers_seen"] = _modules_of(model)


def _modules_of(model):
    return tuple((id(module), type(module)) for module in model.modules())


def _with_silu(initialise):
    @functools.wraps(initialise)
    def initialise_with_silu(self, config, *args, **kwargs):
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if getattr(text, "model_type", None) in _TEXT_TYPES and hasattr(text, "hidden_act"):
            text.hidden_act = "silu"
        return initialise(self, config, *args, **kwargs)

    return initialise_with_silu


class _Peers:
    def __init__(self, config):
        self.config = config
        self.entrances = _Entrances(config.getoption("--peers-fuse"))
        is_worker = hasattr(config, "workerinput")
        results = None if is_worker else config.getoption("--peers-results")
        self.results = open(results, "a", encoding="utf-8") if results else None  # noqa: SIM115
        self.done = _ids(config.getoption("--peers-done"))
        self.only = _ids(config.getoption("--peers-only"))
        self.notes = {}  # id -> what is known of a test that has not ended

    def close(self):
        self.entrances.close()
        if self.results is not None:
            self.results.close()
        set_client_factory(default_client_factory)

    def _write(self, **fields):
        if self.results is not None:
            self.results.write(json.dumps(fields) + "\n")
            self.results.flush()

    def pytest_collection_modifyitems(self, items):
        done, only = self.done, self.only
        items[:] = [item for item in items if item.nodeid not in (done or ()) and (only is None or item.nodeid in only)]

    def pytest_collection_finish(self, session):
        self._write(selected=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        self._write(selected=len(ids))

    def pytest_collectreport(self, report):
        if report.failed:
            note = {"outcome": "failed", "reason": _reason(report), "eligible": 0, "fused": 0, "collecting": True}
            self._write(id=report.nodeid, **note)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        """Ends a test that hangs, and notes what was counted."""

        def stop(*_):
            raise TimeoutError(f"not ended after {_SECONDS} s")

        is_main = threading.current_thread() is threading.main_thread()
        self.entrances.counts.clear()
        if is_main:
            handler = signal.signal(signal.SIGALRM, stop)
            signal.alarm(_SECONDS)
        try:
            return (yield)
        finally:
            if is_main:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, handler)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        report.user_properties = [*report.user_properties, *self.entrances.counts.items()]
        return report

    def pytest_runtest_logreport(self, report):
        note = self.notes.setdefault(report.nodeid, {"outcome": "passed", "reason": ""})
        if report.failed:
            note.update(outcome="failed", reason=note["reason"] or _reason(report))
        elif report.skipped and note["outcome"] == "passed" and not hasattr(report, "context"):  # not of a part alone
            note.update(outcome="skipped", reason=_reason(report))
        if report.when == "teardown" or report.when == "???":  # the latter: the process died
            del self.notes[report.nodeid]
            counts = dict(report.user_properties)
            self._write(id=report.nodeid, **note, **{name: counts.get(name, 0) for name in ("eligible", "fused")})


def _ids(path):
    return None if path is None else frozenset(Path(path).read_text(encoding="utf-8").splitlines())


def _reason(report):
    """The last thing that a report says, in one line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])[:_REASON]
    crash = getattr(report.longrepr, "reprcrash", None)
    said = crash.message if crash is not None else str(report.longrepr)
    return " ".join(said.split())[-_REASON:] if crash is None else " ".join(said.split())[:_REASON]
