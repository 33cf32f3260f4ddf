"""Makes the source root of the kernels importable, also where the project is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
