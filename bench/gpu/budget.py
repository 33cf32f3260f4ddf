"""Time as a budget: every section has a share of what is left, and what it does not use goes to the later ones."""

import time
from collections.abc import Callable, Mapping


class Budget:
    """seconds: of the whole run; shares: relative shares of the sections, in the order in which they run.

    clock: seconds from any origin, never going back.
    """

    def __init__(self, seconds: float, shares: Mapping[str, float], clock: Callable[[], float] = time.monotonic):
        if not seconds > 0 or any(not share > 0 for share in shares.values()):
            raise ValueError(f"budget: expected positive seconds and shares, got {seconds} and {dict(shares)}")
        self.seconds, self.shares, self._clock = seconds, dict(shares), clock
        self._start = clock()

    @property
    def used(self) -> float:
        return self._clock() - self._start

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.used)

    def allowed(self, section: str) -> float:
        """Seconds that `section` may take now: its share of what is left among itself and those after it."""
        names = list(self.shares)
        after = names[names.index(section) :]
        return self.left * self.shares[section] / sum(self.shares[name] for name in after)
