"""Timing ways of doing one thing side by side: on a busy machine only the ratio of neighbouring runs means much."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Ratio(NamedTuple):
    """How many times as long one way takes as another: the median of the rounds, the smallest and the largest."""

    median: float
    low: float
    high: float


class Paired(NamedTuple):
    """Median seconds of both, the median of the rounds' ratios, and the smallest and largest of these ratios."""

    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]


def paired(ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int) -> Paired:
    """Time two ways in turns."""
    seconds = in_turns({"ours": ours, "theirs": theirs}, rounds=rounds)
    median, low, high = ratio(seconds["ours"], seconds["theirs"])
    return Paired(*(statistics.median(values) for values in seconds.values()), median, (low, high))


def in_turns(ways: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round; each must block until its result is there.

    A first round is not counted, and every other round runs backwards, so that none profits from its place. A process that
    is kept to one core is timed by what it computes, so that other work on the machine does not count.
    """
    clock = time.process_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name in list(ways) if i % 2 else reversed(list(ways)):
            started = clock()
            ways[name]()
            if i:
                seconds[name].append(clock() - started)
    return seconds


def ratio(one: list[float], other: list[float]) -> Ratio:
    """one / other, round by round."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
