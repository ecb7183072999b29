"""How something is said: a recording in, the spans of its shots and how stirred the speaker is in each out.

Knows no language: pauses, loudness and pitch only.
"""

import math

import numpy as np
from scipy.ndimage import maximum_filter1d

from kavatar_jax.media import audio
from kavatar_jax.types import Speech

MIN_PAUSE = 0.2  # seconds; shorter silences are the closures of p, t, k and lie inside words
MARGIN = 0.04  # seconds; how far inside its pause a cut stays
LONG_PAUSE = 1.5  # seconds; from here on silence is a state of its own and not a breath
HOP = 0.04  # seconds between values of the contours

Span = tuple[float, float]


def find_spans(speech: Speech, *, max_seconds: float, min_seconds: float) -> list[Span]:
    """Spans (start, end) in seconds that tile [0, speech.seconds), cut only inside pauses of the speech.

    No span is shorter than min_seconds unless the recording is. A span is longer than max_seconds only where no pause
    could divide it into two parts of at least min_seconds. Among those, cuts are few, lie in long pauses and away from
    their edges, and keep speech and long silences apart. A recording without speech is one span.
    """
    if audio.is_silent(speech):
        return [(0.0, speech.seconds)]
    pauses = audio.find_pauses(speech, min_seconds=MIN_PAUSE)
    times, prices = _candidates(speech, pauses)
    silence = _silence_before(times, [pause for pause in pauses if pause[1] - pause[0] >= LONG_PAUSE])
    cuts = _cheapest_cuts(times, prices, silence, max_seconds=max_seconds, min_seconds=min_seconds)
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def find_voice(speech: Speech, spans: list[Span]) -> list[float | None]:
    """Arousal of the voice in each span, 0 to 1; None where nobody speaks.

    Loudness in dB and pitch in semitones above the medians of the whole recording: 0.5 is this speaker's own habit
    whatever the level of the recording, and 6 dB or 4 semitones more are 0.73. Both rise with arousal across languages
    (Scherer 2003, "Vocal communication of emotion").
    """
    if audio.is_silent(speech):
        return [None for _ in spans]
    level = audio.energy_contour(speech, hop=HOP)
    pitch = 12 * np.log2(audio.pitch_contour(speech, hop=HOP))
    time = (np.arange(len(level)) + 0.5) * HOP
    spoken = np.ones(len(level), bool)
    for start, end in audio.find_pauses(speech, min_seconds=MIN_PAUSE):
        spoken &= (time < start) | (time >= end)
    voiced = spoken & np.isfinite(pitch)
    found: list[float | None] = []
    for start, end in spans:
        inside = (time >= start) & (time < end)
        if (inside & spoken).sum() * HOP < min(0.2, 0.5 * (end - start)):  # a click or the tail of a word, not speech
            found.append(None)
            continue
        louder = np.median(level[inside & spoken]) - np.median(level[spoken])
        higher = np.median(pitch[inside & voiced]) - np.median(pitch[voiced]) if (inside & voiced).any() else 0.0
        found.append(float(1 / (1 + np.exp(-louder / 6 - higher / 4))))
    return found


def _candidates(speech: Speech, pauses: list[Span]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) times where a cut may lie, 0 and the end among them, and (n,) what it costs: 1 to 3, less in long pauses."""
    loudest_around = maximum_filter1d(audio.energy_contour(speech, hop=0.01), 9)  # within 45 ms
    times, prices = [0.0], [0.0]
    for start, end in pauses:
        first, last = start + MARGIN, end - MARGIN
        inside = np.linspace(first, last, 2 * math.ceil((last - first) / 0.2) + 1)  # the middle is one of them
        inside = inside[(inside > 0) & (inside < speech.seconds)]
        level = loudest_around[np.minimum(inside / 0.01, len(loudest_around) - 1).astype(int)]
        # A pause may hold a breath, a click or the burst of the next word's first consonant: not to be cut through.
        for time in inside[level <= max(np.median(level) + 10, level.min())]:
            times.append(round(float(time), 3))
            prices.append(1 + MIN_PAUSE / (end - start) + max(0.0, 1 - min(time - start, end - time) / 0.15))
    return np.array([*times, speech.seconds]), np.array([*prices, 0.0])


def _silence_before(times: np.ndarray, pauses: list[Span]) -> np.ndarray:
    """(n,) seconds of the given pauses before each time."""
    return sum((np.clip(times - start, 0, end - start) for start, end in pauses), np.zeros(len(times)))


def _cheapest_cuts(
    times: np.ndarray, prices: np.ndarray, silence: np.ndarray, *, max_seconds: float, min_seconds: float
) -> list[float]:
    """Dynamic programming from the left over all pairs of cuts that are near enough to be worth a span.

    A span costs its closing cut (1 to 3), the seconds of long silence or of speech that are the odd ones out in it,
    and a little for unevenness. Being too long costs more than all that: any cut that shortens it is worth making.
    """
    # Anything longer than this holds a candidate that divides it into two parts of at least min_seconds.
    reach = max_seconds + 2 * min_seconds + np.diff(times).max()
    total = np.full(len(times), np.inf)
    total[0] = 0
    before = np.zeros(len(times), int)
    for end in range(1, len(times)):
        starts = np.arange(np.searchsorted(times, times[end] - reach), end)
        length = times[end] - times[starts]
        quiet = silence[end] - silence[starts]
        mixed = np.minimum(quiet, length - quiet)
        excess = np.maximum(length - max_seconds, 0)
        cost = prices[end] + mixed + 20 * (excess > 0) + 20 * excess / min_seconds + 0.3 * (length / max_seconds) ** 2
        allowed = (length >= min_seconds) | ((starts == 0) & (end == len(times) - 1))
        cost = total[starts] + np.where(allowed, cost, np.inf)
        best = int(np.argmin(cost))
        total[end], before[end] = cost[best], starts[best]
    path = [len(times) - 1]
    while path[-1] > 0:
        path.append(int(before[path[-1]]))
    return [float(times[index]) for index in reversed(path)]
