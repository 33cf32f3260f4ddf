"""A process that does one item of work after another: see `workers`.

    python -m bench.gpu.worker MODULE      items on stdin: {"work": "module:function", "args": {...}, "fresh": bool}

function(**args) gives rows (dicts), each of which becomes a line {"row": ...} on stdout; {"done": ..., "last": ...}
ends the item. MODULE is imported before the first item comes. The process ends with an item that wants it to itself
(fresh), that raised, or after which the device fails: nothing that an item spoiled is left for the next one.
"""

import importlib
import json
import os
import sys
import traceback

from bench.gpu.repository import make_importable


def one_line(error: BaseException) -> str:
    """The type and the first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _device_is_lost() -> bool:
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
    importlib.import_module(arguments[0])

    def say(**message) -> None:
        results.write(json.dumps(message) + "\n")
        results.flush()

    for line in sys.stdin:
        item = json.loads(line)
        is_last = item.get("fresh", False)
        try:
            module, function = item["work"].split(":")
            for row in getattr(importlib.import_module(module), function)(**item["args"]):
                say(row=row)
        except Exception as error:  # the boundary of an item: whatever went wrong is its row
            traceback.print_exc()
            # Memory that other processes held says nothing about the work.
            say(row={"error": one_line(error), "unfinished": type(error).__name__ == "OutOfMemoryError"})
            is_last = True
        is_last = _device_is_lost() or is_last
        say(done=True, last=is_last)
        if is_last:
            results.close()
            os._exit(0)  # at once: a device that is lost hangs the interpreter's end
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
