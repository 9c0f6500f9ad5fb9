"""The time limit of a call: every stage looks at it between two steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from autoprune.errors import OutOfTimeError


class Clock:
    """Counts from now on; `limit_s` seconds are allowed, None for as many as it takes."""

    def __init__(self, limit_s: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._now, self._end = now, math.inf if limit_s is None else now() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds that are left, below 0 where it is too late."""
        return self._end - self._now()

    @property
    def out(self) -> bool:
        """Whether the time is over."""
        return self.left_s <= 0

    def sooner(self, seconds: float) -> Clock:
        """The same that ends so much earlier."""
        other = Clock(None, self._now)
        other.limit_s, other._end = self.limit_s, self._end - seconds
        return other

    def for_search(self, limit_s: float | None, spent_s: float | None, rest_s: float) -> Clock:
        """One that leaves `rest_s` seconds for what comes after the search, at most half of what there is.

        Where a search counts all that its calls have `spent_s`, it has the rest of the limit for itself.
        """
        if limit_s is None:
            return Clock(None)
        if spent_s is not None:
            return Clock(limit_s - spent_s)
        return self.sooner(min(rest_s, 0.5 * max(0.0, self.left_s)))

    def again(self) -> Clock:
        """The same from now on."""
        return Clock(self.limit_s, self._now)

    def check(self) -> None:
        """Raise OutOfTimeError where the time is over."""
        if self.out:
            raise OutOfTimeError(f"the time limit is reached (search.time_limit_s: {self.limit_s:g})")
