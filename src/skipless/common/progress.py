"""How far something is and how long it takes, in words: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

EVERY = 30  # seconds between two lines


class Progress(tqdm):
    """tqdm's bar; where stderr is no terminal, a line every half minute instead, and none for what is done sooner.

    Args:
        active: whether to show anything.
        rest: what tqdm takes, as desc, total, initial and unit.
    """

    def __init__(self, iterable: Iterable[Any] | None = None, *, active: bool = True, **rest: Any):
        self.lines = active and not sys.stderr.isatty()
        super().__init__(iterable, disable=not active or self.lines, **rest)
        self.what, self.first, self.done = rest.get("desc"), rest.get("initial", 0), rest.get("initial", 0)
        self.began = self.said = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        """The items, each counted when the next is asked for."""
        if not self.lines:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more."""
        now, self.done = time.monotonic(), self.done + (n or 0)
        if self.lines and self.total and self.done < self.total and now - self.said >= EVERY:
            self.said = now
            left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
            self.write(f"{self.what}: {100 * self.done / self.total:.0f} %, {duration(left)} left", file=sys.stderr)
        return super().update(n)


def duration(seconds: float) -> str:
    """A time as people say it, in one unit or two: 1 s at least, 40 s, 12 min, 7 h 45 min, 19 d 9 h."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{hours // 24} d {hours % 24} h"


def rate(value: float) -> str:
    """So many a second, two digits at least: 0.036, 7.1, 1,240."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
