"""From measured rows to the table that `mmpeft_fast.ops.dispatch` reads: providers, ways of the GEMMs, tiles.

    python -m bench.gpu table ROWS.jsonl --out kernels/mmpeft_kernels/tuned

Only what rows say is in the table: what no check speaks for is not proven, what was not timed keeps its default.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, geometric_mean

from bench.rows import read_rows
from mmpeft_fast.atomic import write_text
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.ops import dispatch, tape

# A tile or a way has to win by more than two measurements of the same thing differ.
_NOISE = 0.01
# What a Triton GEMM has to gain over the library's, whose launch costs the host a fraction of Triton's: rows "layer".
_KERNEL_GAIN = 0.05
# The slowest row of a provider that is chosen because it is faster on the whole.
_WORST_ROW = 1.05
# Kernels that have tiles; rows of others, which earlier versions had, decide nothing.
_TILED = {"shrink", "masked_dx", "dy_pass", "ddown"}
# Kinds of checks that have to speak for <provider>:<op>; for gemm:<way> its own kind.
_KINDS_OF_PROOF = {"op", "model"}
PROVIDERS = ("triton", "cuda")
_GEMMS = {
    f"lowrank_gemm{suffix} {direction}": (direction, way)
    for suffix, way in (("", "triton"), ("_gluon", "gluon"))
    for direction in ("fwd", "dx")
}


def of_section(rows: Iterable[dict], *names: str) -> list[dict]:
    return [row for row in rows if row.get("section") in names]


def failed(rows: Iterable[dict]) -> list[dict]:
    """The checks that speak against something; one that was ended for its time says nothing."""
    return [row for row in of_section(rows, "checks") if not row.get("ok") and not row.get("unfinished")]


def _touched(row: dict) -> list[str]:
    """What a check that ended without a verdict speaks against: all that it may have been about."""
    if row.get("kind") == "gemm":
        return [f"gemm:{row['name'].split()[0]}"]
    return [f"{row['provider']}:{op}" for op in dispatch.OPS] if "provider" in row else []


def proven(rows: Sequence[dict]) -> set[str]:
    """<provider>:<op> and gemm:<way> that checks of every kind passed for and none failed for."""
    against = {rest for row in failed(rows) for rest in row.get("rests") or _touched(row)}
    kinds: dict[str, set[str]] = defaultdict(set)
    for row in of_section(rows, "checks"):
        for rest in row["rests"] if row.get("ok") else ():
            kinds[rest].add(row["check"].split(":")[0])
    wanted = {rest: {"gemm"} if rest.startswith("gemm:") else _KINDS_OF_PROOF for rest in kinds}
    return {rest for rest, found in kinds.items() if wanted[rest] <= found} - against


def providers(rows: Sequence[dict], allowed: set[str]) -> dict[str, str]:
    """op -> the fastest provider that is proven; Triton where no row compares it with torch, torch where none is.

    Slower than torch: the geometric mean of the ratios is 1 or more, or a row takes more than 1.05 times torch's.
    """
    found = {}
    for op in dispatch.OPS:
        times: dict[str, dict[str, float]] = defaultdict(dict)
        for row in of_section(rows, "ops"):
            if row.get("op") == op and row.get("mode") == "eager" and "p20_ms" in row:
                times[row["implementation"]][row["case"]] = row["p20_ms"]
        means: dict[str, float] = {"torch": 1.0}
        unmeasured = []
        for name in PROVIDERS:
            ratios = [times[name][case] / times["torch"][case] for case in times[name].keys() & times["torch"].keys()]
            if f"{name}:{op}" not in allowed:
                continue
            if not ratios:
                unmeasured.append(name)
            elif max(ratios) <= _WORST_ROW:
                means[name] = geometric_mean(ratios)
        measured = min(means, key=means.get)
        found[op] = unmeasured[0] if measured == "torch" and unmeasured else measured
    return found


# Of one bucket: for every size that was measured, milliseconds by what ran (the tile's fields or a name, as JSON).
_Sizes = list[dict[str, float]]


def _by_bucket(rows: Sequence[dict]) -> dict[tuple[str, str], _Sizes]:
    """(kernel, bucket) -> times by size.

    Host time can only add to a row, so the 20th percentile is taken and the least of equal sizes. A row without
    `host_ms` was measured before calls had a head start: the first of its round holds host time and is left out.
    """
    rounds: dict[tuple, list[dict]] = defaultdict(list)
    for row in of_section(rows, "tiles"):
        if "p20_ms" in row and row["kernel"] in {*_TILED, *_GEMMS}:
            rounds[row["kernel"], row["dtype"], tuple(row["sizes"].items()), row.get("call")].append(row)
    sizes: dict[tuple, dict[str, float]] = defaultdict(dict)
    for (kernel, dtype, size, _), measured in rounds.items():
        times = sizes[kernel, dtype, size]
        for row in measured if "host_ms" in measured[0] else measured[1:]:
            name = json.dumps(row["tile"])
            times[name] = min(row["p20_ms"], times.get(name, float("inf")))
    buckets: dict[tuple[str, str], _Sizes] = defaultdict(list)
    for (kernel, dtype, size), times in sizes.items():
        buckets[kernel, dispatch.bucket(DTYPES[dtype], **dict(size))].append(times)
    return buckets


def _is_tile(name: str) -> bool:
    return not name.startswith('"')


def _best_tile(measured: _Sizes) -> str | None:
    """The tile (as JSON) that is on the mean nearest to the fastest of each size; "null" unless it is beaten clearly.

    Only tiles that every size has are compared.
    """
    ratios: dict[str, list[float]] = defaultdict(list)
    for times in measured:
        tiles = {name: time for name, time in times.items() if _is_tile(name)}
        for name, time in tiles.items():
            ratios[name].append(time / min(tiles.values()))
    means = {name: fmean(values) for name, values in ratios.items() if len(values) == len(measured)}
    best = min(means, key=means.get, default=None)
    return best if best is None or means[best] < means.get("null", float("inf")) * (1 - _NOISE) else "null"


def gemm_ways(rows: Sequence[dict], allowed: set[str]) -> dict[str, str]:
    """ "fwd <bucket>" and "dx <bucket>" -> the fastest way to run the GEMM that is proven."""
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (kernel, bucket), measured in _by_bucket(rows).items():
        if kernel not in _GEMMS:
            continue
        direction, way = _GEMMS[kernel]
        for times in measured:
            # Ratios to the library's bare GEMM of the same turn compare across kernels that were timed apart.
            bare = times.get('"bare"')
            if bare is None:  # cut off between two rows
                continue
            ways = ratios[f"{direction} {bucket}"]
            own = [time for name, time in times.items() if _is_tile(name)]
            if own:
                ways[way].append(min(own) / bare)
            for name, library in (('"torch"', "composite"), ('"layout"', "layout")):
                if name in times:
                    ways[library].append(times[name] / bare)
    found = {}
    for key, ways in ratios.items():
        means = {way: fmean(values) for way, values in ways.items()}
        chosen, time = "composite", means.get("composite", float("inf"))
        for way, gain in (("layout", _NOISE), ("triton", _KERNEL_GAIN), ("gluon", _KERNEL_GAIN)):
            if f"gemm:{way}" not in allowed or way not in means:
                continue
            # Of two kernels the faster one.
            if means[way] < time * (1 - (_NOISE if chosen == "triton" else gain)):
                chosen, time = way, means[way]
        found[key] = chosen
    return found


def other_ways(rows: Sequence[dict]) -> dict[str, dict[str, str]]:
    """kernel -> bucket -> "composite" where the library's GEMMs beat the best tile of a kernel that is no GEMM of the
    table; of masked_dx also "triton" where they do not, since elsewhere the capability decides."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for (kernel, bucket), measured in _by_bucket(rows).items():
        if kernel in _GEMMS:
            continue
        ratios = [
            times['"torch"'] / min(time for name, time in times.items() if _is_tile(name))
            for times in measured
            if '"torch"' in times and any(map(_is_tile, times))
        ]
        if ratios and fmean(ratios) < 1 - _NOISE:
            found[kernel][bucket] = "composite"
        elif ratios and kernel == "masked_dx":
            found[kernel][bucket] = "triton"
    return dict(found)


def tiles(rows: Sequence[dict], ways: Mapping[str, str]) -> dict[str, dict[str, dict[str, int]]]:
    """kernel -> bucket -> the fields of the fastest tile, where that is not the kernel's default.

    ways: as `gemm_ways` gives them: a GEMM's tile is that of its way.
    """
    found: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for (kernel, bucket), measured in _by_bucket(rows).items():
        name = kernel
        if kernel in _GEMMS:
            direction, way = _GEMMS[kernel]
            name = f"lowrank_gemm {direction}"
            if ways.get(f"{direction} {bucket}") != way:
                continue
        best = _best_tile(measured)
        if best not in (None, "null"):
            found[name][bucket] = json.loads(best)
    return dict(found)


def table(rows: Sequence[dict], source: str) -> dispatch.Table:
    """Everything that the rows prove. source: what a user is told the choices come from."""
    allowed = proven(rows)
    ways = gemm_ways(rows, allowed)
    device = next((row["device"] for row in of_section(rows, "machine")), "unknown")
    return dispatch.Table(
        device=device, source=source, providers=providers(rows, allowed), gemm=ways, tiles=tiles(rows, ways),
        ways=other_ways(rows),
    )  # fmt: skip


def write_table(folder: Path, made: dispatch.Table) -> Path:
    """Writes the table as `dispatch.tables` reads it; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{dispatch.slug(made.device)}.json"
    write_text(path, json.dumps(asdict(made), indent=1, sort_keys=True) + "\n")
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


@contextmanager
def forced(
    kernel: str | None = None, fields: Mapping[str, int] | None = None, way: str = "triton"
) -> Iterator[Callable[[Mapping[str, int] | None], None]]:  # fmt: skip
    """Inside, the Triton kernel set reads no table: `kernel` has the tile `fields` (None: its default), all others
    their defaults, and GEMMs run by `way`. Gives a function that changes the tile."""
    tile = [fields]

    def take(fields: Mapping[str, int] | None) -> None:
        tile[0] = fields
        tape.forget()

    committed = dispatch.tile_fields, dispatch.gemm_realisation
    dispatch.tile_fields = lambda name, x, **sizes: tile[0] if name == kernel else None
    dispatch.gemm_realisation = lambda *args, **options: way
    try:
        with installed(Path("no tables")):
            yield take
    finally:
        dispatch.tile_fields, dispatch.gemm_realisation = committed


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu table", description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="rows.jsonl of a run of bench.gpu")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder that the table is written to")
    args = parser.parse_args(arguments)
    try:
        rows = read_rows(args.rows)
    except (OSError, ValueError) as error:
        parser.error(f"{args.rows}: expected rows of bench.gpu, got {type(error).__name__}: {error}")
    print(write_table(args.out, table(rows, args.rows.as_posix())))
    return 0
