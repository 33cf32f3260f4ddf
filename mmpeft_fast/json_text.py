"""JSON from outside: whatever is wrong with it is one ValueError, also where Python's reader raises something else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_utf8(path: Path) -> str:
    """The file's text. Raises ValueError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a readable UTF-8 text file ({error})") from error


def read(path: Path) -> Any:
    """The value that a JSON file holds. Raises ValueError as `read_utf8` and `parse` do."""
    return parse(read_utf8(path), str(path))


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a JSON lines file, blank ones aside, each with its place in words. Raises as `read_utf8` does."""
    for number, line in enumerate(read_utf8(path).splitlines(), start=1):
        if line.strip():
            yield f"{path} line {number}", line


def lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSON lines file, each with its place in words. Raises as `read_utf8` and `parse` do."""
    for where, line in text_lines(path):
        yield where, parse(line, where)


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
