"""From measured rows to the table that `mmpeft_fast.ops.dispatch` reads: providers, ways of the GEMM, tiles."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, geometric_mean

from bench.gpu.judge import DTYPES
from bench.gpu.tunables import Problem
from bench.gpu.tuning import compile_key
from mmpeft_fast.atomic import write_text
from mmpeft_fast.ops import dispatch

# A tile or a way has to win by more than two medians of the same thing differ.
_NOISE = 0.01
# The slowest row of a provider that is chosen because it is faster on the whole.
_WORST_ROW = 1.05


_GEMMS = {
    f"lowrank_gemm{suffix} {direction}": (direction, way)
    for suffix, way in (("", "triton"), ("_gluon", "gluon"))
    for direction in ("fwd", "dx")
}
WAYS = ("layout", "triton", "gluon")


def failed(check_rows: Sequence[dict]) -> list[dict]:
    """The checks that did not pass, those that crashed included."""
    return [row for row in check_rows if not row.get("ok", False)]


def _everything(providers: Sequence[str]) -> set[str]:
    return {f"{name}:{op}" for name in providers for op in dispatch.OPS} | {f"gemm:{way}" for way in WAYS}


def _touched(item: dict, providers: Sequence[str]) -> set[str]:
    """What an item that gave no verdict leaves open."""
    if item.get("kind") == "gemm" or "gluon" in item.get("name", ""):
        return {f"gemm:{way}" for way in WAYS if way in item["name"]}
    if "provider" in item:
        return {f"{item['provider']}:{op}" for op in dispatch.OPS}
    return _everything(providers)


def unproven(check_rows: Sequence[dict], unfinished: Sequence[dict], providers: Sequence[str]) -> set[str]:
    """<provider>:<op> and gemm:<way> that some check speaks against, or that a check was not made for.

    unfinished: items of `checks.items` that were not run; those in bf16 count.
    """
    against: set[str] = set()
    for row in failed(check_rows):
        against |= set(row["rests"]) if "rests" in row else _touched(row, providers)
    for item in unfinished:
        against |= _touched(item, providers) if item["dtype"] == "bf16" else set()
    named = {rest for row in check_rows for rest in row.get("rests", [])}
    return against | (_everything(providers) - named)


def good_tiles(trial_rows: Sequence[dict], kernel: str, problem: Problem) -> list[dict | None]:
    """The candidates of a problem that compiled, were right and did not spill."""
    key = compile_key(kernel, problem)
    return [row["tile"] for row in trial_rows if row["kernel"] == kernel and row.get("key") == key and row["ok"]]


def _by_bucket(rows: Sequence[dict]) -> dict[tuple[str, str], list[list[dict]]]:
    """(kernel, bucket) -> the rows of each of its problems."""
    problems: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if "sizes" in row:
            problems[row["kernel"], row["dtype"], tuple(row["sizes"].items())].append(row)
    buckets: dict[tuple[str, str], list[list[dict]]] = defaultdict(list)
    for (kernel, dtype, sizes), measured in problems.items():
        buckets[kernel, dispatch.bucket(DTYPES[dtype], **dict(sizes))].append(measured)
    return buckets


def _relative(measured: list[list[dict]], wanted) -> dict[str, float]:
    """Mean time relative to the problem's fastest, by tile (as JSON), of the tiles that every problem has."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for rows in measured:
        times = {json.dumps(row["tile"]): row["p50_ms"] for row in rows if wanted(row["tile"])}
        for tile, time in times.items():
            ratios[tile].append(time / min(times.values()))
    return {tile: fmean(values) for tile, values in ratios.items() if len(values) == len(measured)}


def tiles(rows: Sequence[dict], ways: Mapping[str, str]) -> dict[str, dict[str, dict[str, int]]]:
    """kernel -> bucket -> the fields of the fastest tile, where that is not the kernel's default.

    ways: as `gemm_ways` gives them: a GEMM's tile is that of its fastest kernel.
    """
    found: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for (kernel, bucket), measured in _by_bucket(rows).items():
        if kernel in _GEMMS:
            direction, way = _GEMMS[kernel]
            if ways.get(f"{direction} {bucket}") != way:
                continue
            kernel = f"lowrank_gemm {direction}"
        relative = _relative(measured, lambda tile: not isinstance(tile, str))
        if relative:
            best = min(relative, key=relative.get)
            if best != "null" and relative[best] < relative.get("null", float("inf")) * (1 - _NOISE):
                found[kernel][bucket] = json.loads(best)
    return dict(found)


def gemm_ways(rows: Sequence[dict], excluded: set[str]) -> dict[str, str]:
    """ "fwd <bucket>" and "dx <bucket>" -> the fastest way to run the GEMM whose checks passed."""
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (kernel, bucket), measured in _by_bucket(rows).items():
        if kernel not in _GEMMS:
            continue
        direction, way = _GEMMS[kernel]
        for problem in measured:
            # Ratios to the library's bare GEMM of the same turn compare across kernels that were timed apart.
            by_tile = {json.dumps(row["tile"]): row["p50_ms"] for row in problem}
            bare = by_tile.pop('"bare"', None)
            if bare is None:  # cut off between two rows
                continue
            ways = times[f"{direction} {bucket}"]
            own = [time for tile, time in by_tile.items() if not tile.startswith('"')]
            if own:
                ways[way].append(min(own) / bare)
            for tile, name in (('"torch"', "composite"), ('"layout"', "layout")):
                if tile in by_tile:
                    ways[name].append(by_tile[tile] / bare)
    found = {}
    for key, ways in times.items():
        allowed = {way: fmean(ratios) for way, ratios in ways.items() if f"gemm:{way}" not in excluded}
        best = min(allowed, key=allowed.get)
        found[key] = best if allowed[best] < allowed.get("composite", float("inf")) * (1 - _NOISE) else "composite"
    return found


def providers(op_rows: Sequence[dict], excluded: set[str], names: Sequence[str]) -> dict[str, str]:
    """op -> the fastest of the providers `names` whose checks all passed and whose rows beat torch's, else "torch".

    Beating: the geometric mean of the ratios is below 1, and no row is slower than 1.05 times torch's.
    """
    found = {}
    for op in dispatch.OPS:
        times: dict[str, dict[str, float]] = defaultdict(dict)
        for row in op_rows:
            if row.get("op") == op and row.get("mode") == "eager" and "p50_ms" in row:
                times[row["implementation"]][row["case"]] = row["p50_ms"]
        means = {"torch": 1.0}
        for name in names:
            cases = times[name].keys() & times["torch"].keys()
            ratios = [times[name][case] / times["torch"][case] for case in cases]
            if ratios and max(ratios) <= _WORST_ROW and f"{name}:{op}" not in excluded:
                means[name] = geometric_mean(ratios)
        found[op] = min(means, key=means.get)
    return found


def write_table(folder: Path, table: dispatch.Table) -> Path:
    """Writes the table as `dispatch.tables` reads it; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{dispatch.slug(table.device)}.json"
    write_text(path, json.dumps(asdict(table), indent=1, sort_keys=True) + "\n")
    return path


@contextmanager
def installed(folder: Path | None) -> Iterator[None]:
    """Inside, dispatch reads its tables from `folder`; with None everything stays as it is committed."""
    if folder is None:
        yield
        return
    committed = dispatch.tuned_folder
    dispatch.tuned_folder = lambda: folder
    dispatch.read_again()
    try:
        yield
    finally:
        dispatch.tuned_folder = committed
        dispatch.read_again()
