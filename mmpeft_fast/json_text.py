"""JSON from outside: whatever is wrong with it is one ValueError, also where Python's reader raises something else."""

import json
from typing import Any


def parse(text: str, where: str) -> Any:
    """The value that a JSON text holds.

    Args:
        text: of any origin.
        where: what the sentence begins with, such as a file's name.

    Raises:
        ValueError: no valid JSON, nested too deep, or a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{where}: expected valid JSON, but {error.msg} at {place}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: expected JSON of few levels, it is nested too deep to be read") from error
    except ValueError as error:  # more digits than Python converts
        raise ValueError(f"{where}: expected valid JSON, but {error}") from error
