"""From measured rows to what this package's kernels reach, as the planner's device profiles take it.

    python -m bench.gpu rates ROWS.jsonl

Prints for each kernel that has tiles, from its rows with the tile that the committed table names: "bytes", the share of
a copy's bandwidth in the row that moves most, whose products are few, and "products", the median share of the largest
library GEMM's rate in rows of rank 128 and more, where products are what the kernel waits for.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from bench.gpu.tuned import of_section
from bench.rows import read_rows
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.ops import dispatch
from mmpeft_fast.plan.devices import Device, device_named

# Products of [M, R] with one matrix a call: dy's pass makes da and dU.
_PRODUCTS = {"shrink": 1, "ddown": 1, "dy_pass": 2}
_MANY = 128  # a rank from which on products bound the kernels


def _measured(rows: Sequence[dict], tiles: dict, kernel: str) -> Iterator[tuple[int, float, float, float]]:
    """(rank, bytes, FLOPs, seconds) of every row with the table's tile."""
    for row in of_section(rows, "tiles"):
        if row["kernel"] != kernel or "p50_ms" not in row:
            continue
        sizes = row["sizes"]
        if row["tile"] == tiles[kernel].get(dispatch.bucket(DTYPES[row["dtype"]], **sizes)):
            width = sizes["n"] if "n" in sizes else sizes["k"]
            flops = 2 * _PRODUCTS[kernel] * sizes["m"] * width * sizes["r"]
            yield sizes["r"], row["gb_s"] * row["p50_ms"] * 1e6, flops, row["p50_ms"] * 1e-3


def reached(rows: Sequence[dict], table: dispatch.Table, device: Device) -> dict[str, dict[str, float]]:
    """Name of a Triton kernel -> its shares of `device`'s rates, to three digits."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for kernel in _PRODUCTS:
        measured = list(_measured(rows, table.tiles, kernel))
        if measured:
            _, moved, _, seconds = max(measured, key=lambda row: row[1])
            found[f"_{kernel}_kernel"]["bytes"] = _rounded(moved / seconds / device.bytes_per_s)
        many = [flops / seconds for rank, _, flops, seconds in measured if rank >= _MANY]
        if many:
            found[f"_{kernel}_kernel"]["products"] = _rounded(median(many) / device.largest_gemm_rate("bf16"))
    return dict(found)


def _rounded(share: float) -> float:
    return float(f"{share:.3g}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu rates", description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="rows.jsonl of a run of bench.gpu")
    parser.add_argument("--device", default="h200", help="profile whose rates the shares are of (default: h200)")
    args = parser.parse_args(arguments)
    try:
        rows, device = read_rows(args.rows), device_named(args.device)
        table = dispatch.table_named(device.gpu_name)
        if table is None:
            raise ValueError(f"device: expected a profile of a GPU with a table, got {args.device!r}")
    except (OSError, ValueError) as error:
        parser.error(f"{args.rows}: {error}")
    print(json.dumps(reached(rows, table, device), indent=1))
    return 0
