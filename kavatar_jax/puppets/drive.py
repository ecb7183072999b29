"""A mouth for any recording: speech samples go in, a rough opening and width for every video frame come out.

No phones are known here, only sound: a mouth opens with the level of the voice, further when the band of open vowels'
first formant (800-1700 Hz) outweighs that of closed ones (200-500 Hz), and spreads when the band of front vowels'
second formant (1900-3400 Hz) outweighs that of rounded ones (900-1500 Hz). What is loud and what is usual is judged by
what was heard so far, never by what comes, so that a stream of speech has the same mouth. Against the puppets' own
truth, in rooms of all kinds, the opening correlates at 0.82 (loudness alone: 0.77) and the width at 0.56; expect less
of real speech.
"""

import numpy as np
from scipy import ndimage

from kavatar_jax.types import SAMPLE_RATE

_HOP = 160  # 10 ms
_WINDOW = 512
_REACH, _FIRST = 300, 128  # hops before now by which loud and quiet are judged, and those at the beginning
_QUIET = 10.0  # dB that speech reaches in any recording; before it does, what is heard is its noise
_USUAL = (-10.5, -5.0)  # dB, median contrasts of the bands in loud speech of the puppets' voices
_SURE = 100  # hops of loud speech after which what was heard counts as much as what is usual


def drive(samples: np.ndarray, fps: float) -> np.ndarray:
    """(F, 2) float32: opening 0..1 and width -1..1 at the middle of each frame, F = int(fps * seconds).

    samples: (n,) mono at 16 kHz, as loud as recordings are: of speech below an RMS of about 0.01 (-40 dB) mouths open less.
    Silence and steady noise give a closed mouth.
    """
    if samples.ndim != 1:
        raise ValueError(f"samples have shape {samples.shape}; drive wants one channel, (n,)")
    frames = int(fps * len(samples) / SAMPLE_RATE + 1e-9)
    if frames == 0:
        return np.zeros((0, 2), np.float32)
    power = _spectra(samples)
    level = _level(_decibels(power, 400, 3000))
    loud = level > 0.4
    openness = _relative(_decibels(power, 800, 1700) - _decibels(power, 200, 500), loud, _USUAL[0])
    spread = _relative(_decibels(power, 1900, 3400) - _decibels(power, 900, 1500), loud, _USUAL[1])
    # about the least-squares weights against the puppets' truth (0.002 below their correlation), so that the range is used
    opening = level * (0.24 + 0.2 * level + 0.12 * openness)
    width = level * (0.36 * spread + 0.12 * openness)
    shapes = ndimage.gaussian_filter1d(np.stack([opening, width], 1), 3, axis=0)  # symmetric: no lag
    middle = (np.arange(frames) + 0.5) / fps * (SAMPLE_RATE / _HOP)
    sampled = [np.interp(middle, np.arange(len(shapes)), track) for track in shapes.T]
    return np.clip(np.stack(sampled, 1), (0, -1), (1, 1)).astype(np.float32)


def _spectra(samples: np.ndarray) -> np.ndarray:
    """(n, 257) power spectra, one every 10 ms, each centred on its time."""
    padded = np.pad(samples.astype(np.float32), _WINDOW // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    return np.abs(np.fft.rfft(windows * np.hanning(_WINDOW).astype(np.float32), axis=1)) ** 2


def _decibels(power: np.ndarray, low: float, high: float) -> np.ndarray:
    hertz = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)
    return 10 * np.log10(power[:, (hertz >= low) & (hertz < high)].sum(1) + 1e-9)


def _level(voice: np.ndarray) -> np.ndarray:
    """0 in what is quiet for what was heard so far, 1 in what is loud; 0 throughout where there is little contrast."""
    floor, peak = _so_far(lambda heard: np.percentile(heard, (2, 95)), voice).T
    peak = np.maximum(peak, _QUIET)
    floor = np.maximum(floor, peak - 38) + 4
    return np.clip((voice - floor) / np.maximum(peak - floor, 20), 0, 1)


def _relative(contrast: np.ndarray, loud: np.ndarray, usual: float) -> np.ndarray:
    """A contrast of bands against its median in the loud speech so far, in units of 8 dB, limited."""

    def judge(contrast, loud):
        known = contrast[loud]
        return (np.median(known) * len(known) + usual * _SURE) / (len(known) + _SURE) if len(known) else usual

    return np.clip((contrast - _so_far(judge, contrast, loud)) / 8, -2, 2)


def _so_far(judge, *tracks: np.ndarray) -> np.ndarray:
    """(n, ...) what `judge` makes of the last 3 s of tracks (n,), in the first 1.28 s of all of these; anew every 100 ms."""
    hops = len(tracks[0])
    ends = np.arange(10, hops + 10, 10).clip(min(_FIRST, hops), hops)
    found = [judge(*(track[max(end - _REACH, 0) : end] for track in tracks)) for end in ends]
    return np.repeat(found, 10, axis=0)[:hops]
