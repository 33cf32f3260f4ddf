"""A suite's two sides, unfused and fused, and what they differ in."""

import hashlib
import json
import platform
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import peft
import torch
import transformers

import mmpeft_fast
from tests.peers.suites import NEEDED, Launch, Suite

_SIDES = ("unfused", "fused")
# Of pytest's: all passed, some failed, nothing left to run.
_ENDED = (0, 1, 5)
# How a failure says that something had to be fetched.
_OF_NETWORK = ("no network here", "offline mode", "couldn't connect", "LocalEntryNotFound", "OfflineModeIsEnabled")


@dataclass
class Outcome:
    """What came of a suite. Of each side: id -> what is noted of the test."""

    suite: Suite
    sides: dict[str, dict[str, dict]]
    differences: dict[str, str] = field(default_factory=dict)
    unsteady: dict[str, str] = field(default_factory=dict)
    uncollected: dict[str, str] = field(default_factory=dict)  # what pytest could not even read, and why


def compare(suite: Suite, folder: Path, launch: Launch, expression: str | None = None) -> Outcome:
    """Runs both sides, or what is left of them, and once more what differs. expression: of pytest's -k."""
    folder.mkdir(parents=True, exist_ok=True)
    unfused = run_side(suite, "unfused", folder, launch, expression)
    only = _comparable(unfused)
    sides = {"unfused": unfused, "fused": run_side(suite, "fused", folder, launch, expression, only=only)}
    outcome = Outcome(suite, sides)
    outcome.uncollected = {id: note["reason"] for id, note in unfused.items() if note.get("collecting")}
    if not unfused and expression is None:
        outcome.uncollected[suite.name] = "not one test was found"
    differing = _differing(sides)
    if differing:
        again = {
            side: run_side(suite, side, folder, launch, expression, only=list(differing), is_again=True)
            for side in _SIDES
        }
        outcome.differences = _differing(again)
        outcome.unsteady = {id: why for id, why in differing.items() if id not in outcome.differences}
    return outcome


def _comparable(unfused: Mapping[str, dict]) -> list[str]:
    """The tests that can differ: any other fails already, or has nothing that `fuse` knows."""
    return [id for id, note in unfused.items() if note["outcome"] == "passed" and note["eligible"]]


def _differing(sides: Mapping[str, Mapping[str, dict]]) -> dict[str, str]:
    """The tests that pass unfused and not fused, and what they said."""
    unfused, fused = (sides[side] for side in _SIDES)
    lost = {"outcome": "lost", "reason": "it was not run"}
    found = {
        id: fused.get(id, lost) for id, note in unfused.items() if note["outcome"] == "passed" and note["eligible"]
    }
    return {id: f"{note['outcome']}: {note['reason']}" for id, note in found.items() if note["outcome"] != "passed"}


def run_side(
    suite: Suite,
    side: str,
    folder: Path,
    launch: Launch,
    expression: str | None,
    only: list[str] | None = None,
    is_again: bool = False,
) -> dict[str, dict]:
    """The results of one side by test id; runs what is not there yet for these versions. only: these tests alone;
    is_again: kept beside those of the first time."""
    stem = f"{suite.name.replace(' ', '-')}.{side}" + (".again" if is_again else "")
    file, head = folder / f"{stem}.jsonl", _versions(suite, side, only, expression)
    if only == []:
        return {}
    lines = _lines(file)
    if not lines or lines[0] != head:
        file.write_text(json.dumps(head) + "\n", encoding="utf-8")
        lines = [head]
    if not any("ended" in line for line in lines):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")  # without half a line
        arguments = [
            str(suite.file.relative_to(suite.root)), f"--rootdir={suite.root}", "-o", "addopts=",
            # A suite may make errors of warnings, and a later version of a library it uses may warn.
            "-W", "default::FutureWarning", "-W", "default::DeprecationWarning", "--import-mode=importlib",
            "-p", "no:cacheprovider", "-p", "fusing", "-q", "--tb=short", f"--peers-results={file}",
        ]  # fmt: skip
        if expression is not None:
            arguments += ["-k", expression]
        if side == "fused":
            arguments.append("--peers-fuse")
        for option, ids in (("done", [line["id"] for line in lines if "id" in line]), ("only", only)):
            if ids:
                listed = folder / f"{stem}.{option}"
                listed.write_text("\n".join(ids), encoding="utf-8")
                arguments.append(f"--peers-{option}={listed}")
        with _progress(f"{suite}, {side}", file):
            code = launch(arguments, suite.root)
        lines = _lines(file)
        if code in _ENDED or not any("selected" in line for line in lines):
            with open(file, "a", encoding="utf-8") as written:
                written.write(json.dumps({"ended": code}) + "\n")
    return {line["id"]: line for line in lines if "id" in line}


def _version_of(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _lines(file: Path) -> list[dict]:
    """The whole lines of a file of results."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _versions(suite: Suite, side: str, only: list[str] | None, expression: str | None) -> dict:
    """What a side's results rest on. only: the tests that were chosen, by id; expression: by pytest's -k."""
    files = [suite.file, *(Path(__file__).with_name(name) for name in ("fusing.py", "hub.py"))]
    if side == "fused":
        package = Path(mmpeft_fast.__file__).parent
        files += [*package.rglob("*.py"), *package.rglob("*.json"), *package.glob("*.so")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    digest.update(repr(only).encode())
    libraries = {library.__name__: library.__version__ for library in (peft, transformers, torch)}
    helpers = {name: _version_of(name) for name in ("accelerate", "pytest", "pytest-xdist", *NEEDED.values())}
    return {
        "suite": suite.name,
        "side": side,
        "python": platform.python_version(),
        **libraries,
        "helpers": helpers,
        "chosen": expression,
        "digest": digest.hexdigest(),
    }


@contextmanager
def _progress(what: str, file: Path):
    """Says every ten seconds how many tests are done."""
    ended = threading.Event()

    def say():
        while not ended.wait(10):
            lines = _lines(file)
            done = sum("id" in line for line in lines)
            before = next((i for i, line in enumerate(lines) if "selected" in line), len(lines))
            selected = max((line["selected"] for line in lines if "selected" in line), default=None)
            known = sum("id" in line for line in lines[:before])
            print(f"{what}: {done} of {'?' if selected is None else known + selected} tests", flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _count(notes: Mapping[str, dict], outcome: str) -> int:
    return sum(note["outcome"] == outcome for note in notes.values())


def report(outcomes: list[Outcome]) -> int:
    """Prints counts, then every difference; the exit status: 1 for a difference, 2 where a suite says nothing."""
    for outcome in outcomes:
        print(f"\n{outcome.suite}")
        for side, notes in outcome.sides.items():
            counts = ", ".join(f"{_count(notes, kind)} {kind}" for kind in ("passed", "failed", "skipped"))
            print(f"  {side:7}  {counts}")
        unfused, fused = (outcome.sides[side] for side in _SIDES)
        eligible, ran = len(_comparable(unfused)), sum(note["fused"] > 0 for note in fused.values())
        print(f"  a model that fuse knows in {eligible} of those that pass; layers fused in {ran} tests")
        failed = [note["reason"] for note in unfused.values() if note["outcome"] == "failed"]
        wanted = sum(any(sign in reason for sign in _OF_NETWORK) for reason in failed)
        if failed:
            print(f"  {len(failed)} fail unfused and say nothing; {wanted} of them could not run without a network")
        for id, why in outcome.uncollected.items():
            print(f"  error: {id} could not be collected: {why}")
        for title, found in (("differs", outcome.differences), ("differed once, not again", outcome.unsteady)):
            for id, why in found.items():
                print(f"  {title}: {id}: {why}")
    number = sum(len(outcome.differences) for outcome in outcomes)
    print(f"\n{number} differences")
    return 2 if any(outcome.uncollected for outcome in outcomes) else int(number > 0)
