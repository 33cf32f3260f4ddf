"""The README's table from step rows: python -m bench.table bench/results/<device>/step.jsonl."""

import argparse
import json
from pathlib import Path

COLUMNS = ("method", "dtype", "step / frozen: peft", "fused", "fused / peft", "saved MiB: frozen", "peft", "fused")


def table(rows: list[dict]) -> str:
    """One Markdown line for each method and dtype, from its newest three rows."""
    cells: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["dtype"]), {})[row["implementation"]] = row
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
    rows = [json.loads(line) for line in parser.parse_args().rows.read_text().splitlines()]
    print(table(rows))


if __name__ == "__main__":
    main()
