"""The README's table from step rows: python -m bench.table bench/results/<device>/step.jsonl."""

import argparse
from pathlib import Path

from bench.rows import read_rows

COLUMNS = ("method", "dtype", "step / frozen: peft", "fused", "fused / peft", "saved MiB: frozen", "peft", "fused")


def table(rows: list[dict]) -> str:
    """One Markdown line for each method and dtype, from its newest three rows."""
    cells: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        base = row.get("base", "dense")
        method = row["method"] if base == "dense" else f"{row['method']} on {base}"
        method += f", {row['recompute']} again" if row.get("recompute") else ""
        cells.setdefault((method, row["dtype"]), {})[row["implementation"]] = row
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    for (method, dtype), by_name in cells.items():
        frozen, peft, fused = (by_name[name] for name in ("frozen", "peft", "fused"))
        values = (
            f"{peft['x_frozen']:.2f}", f"{fused['x_frozen']:.2f}", f"**{fused['x_peft']:.2f}**",
            *(f"{row['saved_mib']:.0f}" for row in (frozen, peft, fused)),
        )  # fmt: skip
        lines.append(f"| {method} | {dtype} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("rows", type=Path)
    path = parser.parse_args().rows
    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        parser.error(f"expected a JSON-lines file of step rows, {path} cannot be read: {error}")
    print(table(rows))


if __name__ == "__main__":
    main()
