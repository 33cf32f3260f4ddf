"""The peers' own tests with every eligible model fused: `python -m tests.peers`, or `make peer-tests`.

Suites of HF PEFT (from its source distribution on the package index) and of transformers (from a checkout that the
caller names) run twice as they were published, unfused and fused (`fusing.py`). What passes unfused and does not pass
fused is a difference; it counts if it comes again when both sides are run once more. Nothing of the suites is kept but
in the output folder. A run that was stopped goes on where it was.
"""

import argparse
import signal
import sys
from pathlib import Path

from tests.peers import suites
from tests.peers.comparing import compare, report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--transformers", type=Path, help="a checkout of transformers, of the installed version")
    parser.add_argument("--output", type=Path, default=Path("results/peers"), help="where everything is kept")
    parser.add_argument("--workers", type=int, default=2, help="processes (pytest-xdist)")
    parser.add_argument("-k", dest="expression", help="tests whose names match, as pytest's -k")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="suites whose names contain one of these")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        output = chosen.output.resolve()
        output.mkdir(parents=True, exist_ok=True)
        found = suites.find(output, chosen.transformers and chosen.transformers.resolve())
        if chosen.only:
            found = [suite for suite in found if any(name in suite.name for name in chosen.only)]
        launch = suites.launcher(output, chosen.workers)
        return report([compare(suite, output / "runs", launch, chosen.expression) for suite in found])
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
