"""A process that does one item of work after another, so that a crash or a lost GPU costs one item: see `workers`.

    python -m bench.gpu.worker MODULE:FUNCTION      items on stdin, one JSON object of keyword arguments a line

FUNCTION(**item) gives rows (dicts), each of which becomes a line {"row": ...} on stdout; {"done": true} ends the item.
"""

import importlib
import importlib.util
import json
import os
import sys
import traceback

from bench.gpu.repository import make_importable


def one_line(error: BaseException) -> str:
    """The type and the first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def device_errors() -> tuple[type[Exception], ...]:
    """What a device may answer instead of a result: out of memory, a launch or a compile that fails."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def device_is_lost() -> bool:
    """Whether CUDA has failed for good in this process: every later call would fail too."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(arguments: list[str]) -> int:
    # Whatever libraries print goes to stderr: stdout belongs to the rows.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    make_importable()
    module, function = arguments[0].split(":")
    work = getattr(importlib.import_module(module), function)

    def say(message: dict) -> None:
        results.write(json.dumps(message) + "\n")
        results.flush()

    for line in sys.stdin:
        item = json.loads(line)
        try:
            for row in work(**item):
                say({"row": row})
        except Exception as error:  # the boundary of an item: whatever went wrong is its row, and the next item runs
            traceback.print_exc()
            say({"row": {"error": one_line(error)}})
        is_lost = device_is_lost()
        say({"done": True, "is_last": is_lost})
        if is_lost:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
