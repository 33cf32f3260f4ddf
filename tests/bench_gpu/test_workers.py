"""Worker processes: what goes wrong in an item is a row of its own and stays in its process."""

import os
import sys

from bench.gpu.build import Build
from bench.gpu.workers import run_items


class Rows:
    def __init__(self):
        self.found: list[tuple[dict, dict]] = []

    def __call__(self, item, row):
        self.found.append((item, row))

    @property
    def rows(self):
        return [row for _, row in self.found]


def items(work, *arguments, **more):
    return [{"work": work, "args": each, **more} for each in arguments]


def test_errors_and_crashes_are_rows(tmp_path):
    rows, log = Rows(), tmp_path / "log"
    given = items("json:loads", {"s": '[{"a": 1}, {"a": 2}]'}, {"s": "broken"}, {"s": '[{"a": 3}]'})
    assert run_items(given, rows, seconds=60, log=log) == []
    assert [row.get("a") for row in rows.rows] == [1, 2, None, 3]
    assert rows.rows[2]["error"].startswith("JSONDecodeError: Expecting value") and not rows.rows[2]["unfinished"]
    assert "Traceback" in log.read_text()
    rows = Rows()
    assert run_items(items("os:_exit", {"status": 3}, {"status": 4}), rows, seconds=60, log=log) == []
    assert rows.rows == [{"error": f"the process died with status {code}"} for code in (3, 4)]


def test_a_process_ends_with_an_item_that_raised_or_wants_it_to_itself(tmp_path):
    """Rows of `bench.gpu.worker:own_id` say which process they come from."""
    work, rows = "tests.bench_gpu.an_item:process", Rows()
    fine, wrong = {"raises": False}, {"raises": True}
    given = items(work, fine, fine, wrong, fine) + items(work, fine, fine, fresh=True) + items(work, fine)
    assert run_items(given, rows, seconds=60, log=tmp_path / "log") == []
    ids = [row.get("process") for row in rows.rows if "process" in row]
    first, second, failing, third, fourth, fifth, sixth = ids
    assert first == second == failing != third
    # A fresh item takes the process that is there, and leaves none behind.
    assert third == fourth and len({fourth, fifth, sixth}) == 3
    assert [row["error"] for row in rows.rows if "error" in row] == ["RuntimeError: spoiled"]


def test_items_are_ended_in_time_and_that_says_nothing_about_them(tmp_path):
    rows, sleep, options = Rows(), {"args": ["sleep", "600"]}, {"log": tmp_path / "log", "processes": 2}
    assert run_items(items("subprocess:run", sleep, sleep, seconds=0.5), rows, seconds=60, **options) == []
    assert rows.rows == [{"error": "ran longer than 0.5 s", "unfinished": True}] * 2
    rows, given = Rows(), items("subprocess:run", *({"args": ["sleep", f"60{i}"]} for i in range(4)))
    left = run_items(given, rows, seconds=0.5, **options)
    assert sorted(map(repr, left)) == sorted(map(repr, given)) and not rows.found
    assert run_items(given, rows, seconds=0, **options) == given


def test_memory_that_others_held_says_nothing(tmp_path):
    rows = Rows()
    run_items(items("tests.bench_gpu.an_item:out_of_memory", {}), rows, seconds=60, log=tmp_path / "log")
    assert rows.rows[0]["unfinished"] and rows.rows[0]["error"].startswith("OutOfMemoryError")


def test_a_build_that_fails_is_a_row(tmp_path):
    log = tmp_path / "log"
    row = Build(log, [sys.executable, "-c", "import sys; print('no'); sys.exit(3)"]).finish(60)
    assert (row["ok"], row["reason"]) == (False, "status 3; see log") and "no" in log.read_text()
    assert Build(log, ["sleep", "60"]).finish(0.2)["reason"] == "not done after 0 s"
    assert Build(log, ["true"]).finish(60)["ok"] and os.path.exists(log)
