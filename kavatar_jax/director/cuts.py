"""Where the cascade cuts a performance into sub-clips: a storyline in, frame indices out.

Clip i shows the frames c_i .. c_{i+1}, both included: neighbours share the frame at the cut, which is the last frame of
one and the first of the other. A video VAE of stride 4 codes 4k + 1 frames (Wan 2.1), so every difference is 4k.
"""

import math
from bisect import bisect_left, bisect_right

import numpy as np

from kavatar_jax.types import Storyline

STRIDE = 4  # frames per latent frame
EVENNESS = 0.05  # small against 1, the price of one misplaced cut: it only settles what nothing else does


def cut_points(
    storyline: Storyline, *, fps: float, window_frames: int, frames: int, quiet: np.ndarray | None = None
) -> list[int]:
    """Cuts 0 = c_0 < c_1 < ... < c_n, c_n the first multiple of 4 that is at least frames - 1.

    fps: frames per second. window_frames: the longest clip in frames, 4k + 1. frames: length of the video.
    quiet: (frames,) energy of the speech at each frame in any unit, for only its order counts. Cuts inside a shot go
        where it is low; without it they divide the shot evenly.

    No clip is longer than the window, none shorter than a quarter of it unless the whole video is. Within that, the
    cuts are the cheapest set: each boundary between shots that is left uncut costs 1 and its distance to the nearest
    cut in windows; each cut that is no boundary costs 1 and its loudness (0 the quietest frame .. 1 the loudest). The
    cut of a boundary is the multiple of 4 nearest to it.

    ValueError: a window that is not 4k + 1, a video of less than two frames.
    """
    if window_frames < STRIDE + 1 or window_frames % STRIDE != 1:
        raise ValueError(
            f"window of {window_frames} frames: the VAE needs 4k + 1, such as {max(5, window_frames // 4 * 4 + 1)}"
        )
    if frames < 2:
        raise ValueError(f"a video of {frames} frame: give speech of at least {2 / fps:g} s")
    assert quiet is None or (quiet.ndim == 1 and len(quiet)), quiet.shape
    last = math.ceil((frames - 1) / STRIDE)
    boundaries = sorted({_nearest(shot.start * fps / STRIDE) for shot in storyline.shots} & set(range(1, last)))
    price = np.ones(last + 1) if quiet is None else 1 + _loudness(quiet, last)
    price[[*boundaries, last]] = 0
    longest = (window_frames - 1) // STRIDE
    shortest = min(math.ceil((window_frames / 4 - 1) / STRIDE), last)
    return [STRIDE * point for point in _cheapest_path(price, boundaries, shortest=shortest, longest=longest)]


def _nearest(x: float) -> int:
    """The nearest integer, halves always upwards: Python's round would give equal shots unequal clips."""
    return math.floor(x + 0.5)


def _loudness(quiet: np.ndarray, last: int) -> np.ndarray:
    """(last + 1,) share of the video's frames that are quieter than the frame at each grid point."""
    at_grid = quiet[np.minimum(STRIDE * np.arange(last + 1), len(quiet) - 1)]
    return np.searchsorted(np.sort(quiet), at_grid, side="left") / len(quiet)


def _cheapest_path(price: np.ndarray, boundaries: list[int], *, shortest: int, longest: int) -> list[int]:
    """Grid points from 0 to len(price) - 1 in steps of shortest to longest, by dynamic programming from the left.

    There is always one: longest >= 2 * shortest - 1, so every length from shortest upwards is a sum of such steps.
    """
    last = len(price) - 1
    total = [0.0] + [math.inf] * last
    before = [0] * (last + 1)
    for end in range(shortest, last + 1):
        for start in range(max(0, end - longest), end - shortest + 1):
            evenness = EVENNESS * ((end - start) / longest) ** 2
            cost = total[start] + price[end] + evenness + _uncut(boundaries, start, end, longest)
            if cost < total[end]:
                total[end], before[end] = cost, start
    path = [last]
    while path[-1] > 0:
        path.append(before[path[-1]])
    return path[::-1]


def _uncut(boundaries: list[int], start: int, end: int, longest: int) -> float:
    """The price of the boundaries strictly between two cuts: 1 each and the way to the nearer cut, in windows."""
    inside = boundaries[bisect_right(boundaries, start) : bisect_left(boundaries, end)]
    return sum(1 + min(point - start, end - point) / longest for point in inside)
