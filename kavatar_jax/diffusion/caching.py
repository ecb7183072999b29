"""Which steps of a branch of guidance reuse what the transformer's blocks added to its tokens at an earlier step.

Known before the first step: how large that residual is at each noise level was measured once (tools/calibrate_cache.py), and
where it has hardly changed since the branch last went through the blocks, it is added again instead. Source: MagCache,
arXiv 2506.09045, algorithm 1. There a ratio is kept for each step; here magnitudes over noise levels, whose quotients are
these ratios, so that one calibration serves every number of steps.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kavatar_jax.config import CacheConfig, Magnitudes
from kavatar_jax.diffusion.guidance import Branch


class Reuse(NamedTuple):
    """Of one step. reused: names of the branches that do not go through the blocks; kept: those whose residual is reused
    later."""

    reused: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


NO_REUSE = Reuse()


def name_of(branch: Branch) -> str:
    """What a branch is told, whatever it weighs: "positive heard"."""
    return " ".join(name for name, value in branch._asdict().items() if value is True) or "nothing"


def plan_reuse(sigmas: np.ndarray, branches: list[tuple[Branch, ...]], cache: CacheConfig) -> list[Reuse]:
    """One Reuse for each step, from the steps' noise levels (n + 1,), with the final 0, and their branches.

    ValueError if a branch was not calibrated.
    """
    if not cache.threshold:
        return [NO_REUSE] * len(branches)
    steps = [[name_of(branch) for branch in step] for step in branches]
    names = sorted({name for step in steps for name in step})
    first = math.ceil(cache.start * len(steps))
    reused = {}
    for name in names:
        there = [i for i, step in enumerate(steps) if name in step]
        reused[name] = _reused_steps(there, first, sigmas, _magnitudes_of(name, cache), cache)

    def kept(i: int, name: str) -> bool:
        return next((j in reused[name] for j in range(i + 1, len(steps)) if name in steps[j]), False)

    return [
        Reuse(tuple(name for name in names if i in reused[name]), tuple(name for name in names if kept(i, name)))
        for i in range(len(steps))
    ]


def read_cache(path: Path) -> CacheConfig:
    """What tools/calibrate_cache.py wrote: the fields of a CacheConfig as JSON. ValueError if it is something else."""
    try:
        fields = json.loads(path.read_text())
        magnitudes = [
            Magnitudes(branch=each["branch"], sigmas=tuple(each["sigmas"]), values=tuple(each["values"]))
            for each in fields.pop("magnitudes")
        ]
        return CacheConfig(**fields, magnitudes=tuple(magnitudes))
    except FileNotFoundError:
        raise ValueError(f"--cache {path}: there is no such file; tools/calibrate_cache.py makes one") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"--cache {path} is not what tools/calibrate_cache.py writes: {error}") from None


def _reused_steps(there: list[int], first: int, sigmas, magnitudes: Magnitudes, cache: CacheConfig) -> set[int]:
    """Of the steps `there`, those at which the error summed up since the last full one stays below the threshold."""
    reused, last, error, row = set(), None, 0.0, 0
    for i in there:
        size = _magnitude_at(float(sigmas[i]), magnitudes)
        if last is not None and size is not None:
            error, row = error + abs(1 - size / last), row + 1
            if i >= first and error < cache.threshold and row <= cache.longest:
                reused.add(i)
                continue
        last, error, row = size, 0.0, 0
    return reused


def _magnitude_at(sigma: float, magnitudes: Magnitudes) -> float | None:
    """None outside of the levels that were measured."""
    levels = magnitudes.sigmas
    if not levels[-1] <= sigma <= levels[0]:
        return None
    return float(np.interp(sigma, levels[::-1], magnitudes.values[::-1]))


def _magnitudes_of(name: str, cache: CacheConfig) -> Magnitudes:
    found = {magnitudes.branch: magnitudes for magnitudes in cache.magnitudes}
    if name not in found:
        raise ValueError(
            f"the cache knows no magnitudes of the branch {name!r}, only of {', '.join(found)}; "
            "run tools/calibrate_cache.py with the same guidance"
        )
    return found[name]
