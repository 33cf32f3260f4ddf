"""A progress line: which job runs, how many are done, and how long it still takes, from the jobs that have ended."""

import shutil
import statistics
import sys
import time
from typing import TextIO

# Seconds a job is taken to last until one of its kind has ended (2 CPU cores, default options).
FIRST_GUESS_S = {"base": 60.0, "cell": 9.0, "untimed cell": 4.0}
BAR_WIDTH = 20


class Progress:
    """One line, redrawn in place on a terminal; elsewhere one line for each job that starts.

    Args:
        kinds: the kind of each job still to run, in order; a kind is a key of FIRST_GUESS_S.
        stream: where to draw.
    """

    def __init__(self, kinds: list[str], stream: TextIO | None = None) -> None:
        self._kinds = kinds
        self._stream = sys.stderr if stream is None else stream
        self._seconds: dict[str, list[float]] = {kind: [] for kind in FIRST_GUESS_S}
        self._done = 0
        self._name = ""
        self._started = 0.0

    def start(self, name: str) -> None:
        """The next job, called `name`, starts now."""
        self._name = name
        self._started = time.monotonic()
        if self._stream.isatty():
            self.tick()
        else:
            print(self._line(), file=self._stream, flush=True)

    def tick(self) -> None:
        """Redraws the line of the running job."""
        if self._stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            filled = round(BAR_WIDTH * self._done / len(self._kinds))
            bar = "█" * filled + "░" * (BAR_WIDTH - filled)
            self._stream.write(f"\r\x1b[K{f'{bar} {self._line()}'[:width]}")
            self._stream.flush()

    def finish(self) -> None:
        """The running job has ended."""
        self._seconds[self._kinds[self._done]].append(time.monotonic() - self._started)
        self._done += 1

    def say(self, text: str) -> None:
        """Prints a line of its own above the progress line."""
        self.clear()
        print(text, file=self._stream, flush=True)

    def clear(self) -> None:
        """Takes the line off the terminal."""
        if self._stream.isatty():
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def seconds_left(self) -> float:
        """Estimated seconds until the last job ends; the running job counts for what is left of it."""
        expected = [self._expected(kind) for kind in self._kinds[self._done :]]
        running = max(0.0, expected[0] - (time.monotonic() - self._started)) if expected else 0.0
        return running + sum(expected[1:])

    def _expected(self, kind: str) -> float:
        seen = self._seconds[kind]
        return statistics.fmean(seen) if seen else FIRST_GUESS_S[kind]

    def _line(self) -> str:
        minutes, seconds = divmod(round(self.seconds_left()), 60)
        return f"{self._done + 1}/{len(self._kinds)}  {self._name}  about {minutes}:{seconds:02d} left"
