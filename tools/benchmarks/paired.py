"""Timing two ways of doing one thing, side by side: on a busy machine only the ratio of neighbouring runs means much."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Paired(NamedTuple):
    """Median seconds of both, the median of the rounds' ratios, and the smallest and largest of these ratios."""

    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]


def paired(ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int) -> Paired:
    """Run both in turns, first one leading and then the other; each must block until its result is there.

    One round is run before the clock starts.
    """
    seconds: tuple[list[float], list[float]] = [], []
    for i in range(-1, rounds):
        for side in (0, 1) if i % 2 else (1, 0):
            started = time.perf_counter()
            (ours, theirs)[side]()
            if i >= 0:
                seconds[side].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    medians = (statistics.median(side) for side in seconds)
    return Paired(*medians, statistics.median(ratios), (min(ratios), max(ratios)))
