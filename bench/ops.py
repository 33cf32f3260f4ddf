"""Ops one by one, forward and backward, implementations interleaved: python -m bench.ops --dtype bf16 --out FILE."""

import argparse
from dataclasses import asdict, fields
from pathlib import Path

import torch

from bench.registry import OPS, Shape, make_case
from bench.rows import append_rows, environment, interleaved, quantiles
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.measure import saved_bytes


def bench_op(name: str, shape: Shape, dtype: str, device: str, rounds: int) -> list[dict]:
    case = make_case(name, shape, dtype=DTYPES[dtype], device=device)
    times = interleaved({key: (lambda key=key: case.run(key)) for key in case.forwards}, rounds=rounds)
    rows = []
    for key, values in times.items():
        with saved_bytes() as saved:
            outputs = case.forwards[key]()
        del outputs
        rows.append(
            {"op": name, "mode": "fwd_bwd", "implementation": key, "dtype": dtype, **asdict(shape), **quantiles(values)}
            | {"saved_mib": saved.bytes / 2**20, **environment()}
        )
    by_name = {row["implementation"]: row["p50_ms"] for row in rows}
    for row in rows:
        row |= {"x_frozen": row["p50_ms"] / by_name["frozen"], "x_eager": row["p50_ms"] / by_name["eager"]}
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"some of {', '.join(OPS)} (default: all)")
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON-lines file to append rows to")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = parser.parse_args(arguments)
    unknown = [name for name in args.ops if name not in OPS]
    if unknown:
        parser.error(f"unknown ops {unknown}; expected some of {sorted(OPS)}")
    shape = Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})
    for name in args.ops or OPS:
        rows = bench_op(name, shape, args.dtype, args.device, args.rounds)
        for row in rows:
            ratios = f"{row['x_frozen']:6.2f} x frozen {row['x_eager']:6.2f} x eager"
            label = f"{name:20} {args.dtype} {row['implementation']:7}"
            print(f"{label} {row['p50_ms']:9.2f} ms {ratios}  saved {row['saved_mib']:7.1f} MiB", flush=True)
        if args.out:
            append_rows(args.out, rows)


if __name__ == "__main__":
    main()
