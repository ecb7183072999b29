"""What a performance is worth: what was read from its frames and the truth go in, numbers and decisions come out.

`measure` reads the pixels; here are sync, shut lips in silence, faithful colours, drift over a long video, obedience to a
prompt and seams between sub-clips, each with what chance alone would give where that can be measured.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from kavatar_jax.puppets.colour import ciede2000, lab
from kavatar_jax.puppets.measure import Reading

REACH = 5  # frames by which a mouth may come early or late and still be recognised
PARTS = ("skin", "hair", "clothes", "background")
NEUTRAL = "neutral"
FAMILIES = {  # what prompts of one family ask for excludes the others
    "emotion": ("smile", "frown"),
    "head": ("turn left", "turn right"),
    "hand": ("raise hand",),
    "camera": ("zoom in", "zoom out"),
}
BARS = {  # what a response has to exceed: units of smile, degrees, share of a raised hand, zoom
    "smile": 0.0,
    "frown": 0.0,
    "turn left": 4.0,
    "turn right": 4.0,
    "raise hand": 0.4,
    "zoom in": 0.04,
    "zoom out": 0.03,
}
_STILL = 1e-3  # standard deviation of an opening that is noise of the reader, not motion
_LEAST = 3  # frames that a correlation needs

Pair = tuple[np.ndarray, np.ndarray]  # (F,) opening as seen and (G,) as it should be; what one has more is not compared


@dataclass(frozen=True)
class Sync:
    """Correlations of mouth openings, without delay and at the lag within REACH frames where they are highest.

    lag: frames by which the mouth comes late. pooled: over the frames of all clips at once; clip: median of the clips'
    own, each at its own lag. Clips whose truth never moves count in neither median.
    """

    clips: int
    frames: int
    pooled: float
    lag: int
    pooled_at_lag: float
    clip: float
    clip_lag: float
    clip_at_lag: float


@dataclass(frozen=True)
class Drift:
    """slope: least squares, per 100 frames; first, last: means over the ends of the video; change: last - first."""

    slope: float
    first: float
    last: float
    change: float


@dataclass(frozen=True)
class Trial:
    """A video made with a prompt. puppet: whose; trials of one puppet share voice and seed. asked: a key of BARS or
    NEUTRAL."""

    puppet: int
    asked: str
    reading: Reading


@dataclass(frozen=True)
class Control:
    """success, chance: shares; response: mean over the trials, in the units of the bar; others: how many gave `chance`."""

    trials: int
    success: float
    chance: float
    others: int
    response: float
    bar: float


@dataclass(frozen=True)
class Seams:
    """joint: mean step onto the frame after a cut; usual: 95th percentile of a clip's other steps, mean over clips;
    ratio: of the two, mean over joints; above: share of joints above their clip's 95th percentile, 0.05 by chance."""

    joints: int
    joint: float
    usual: float
    ratio: float
    above: float


def correlate(seen: np.ndarray, truth: np.ndarray, *, lag: int = 0) -> float:
    """Pearson correlation of seen[t + lag] with truth[t]: at its highest where what is seen comes `lag` frames late.

    A mouth that never moves correlates at 0; nan where the truth does not move or fewer than 3 frames overlap.
    """
    seen, truth = _overlap(seen, truth, lag)
    if len(truth) < _LEAST or truth.std() < _STILL:
        return float("nan")
    if seen.std() < _STILL:
        return 0.0
    return float(np.corrcoef(seen, truth)[0, 1])


def judge_sync(pairs: list[Pair]) -> Sync:
    """See Sync. Lags are sought within REACH frames."""
    lags = sorted(range(-REACH, REACH + 1), key=abs)  # of equals the smallest
    pooled = {}
    for lag in lags:
        parts = [_overlap(*pair, lag) for pair in pairs]
        pooled[lag] = correlate(*(np.concatenate(side) for side in zip(*parts, strict=True)))
    lag = _best(pooled)
    moving = [pair for pair in pairs if np.isfinite(correlate(*pair))]
    own = [{shift: correlate(*pair, lag=shift) for shift in lags} for pair in moving]
    bests = [_best(scores) for scores in own]
    return Sync(
        clips=len(pairs),
        frames=sum(len(_overlap(*pair, 0)[0]) for pair in pairs),
        pooled=pooled[0],
        lag=lag,
        pooled_at_lag=pooled[lag],
        clip=_median([scores[0] for scores in own]),
        clip_lag=_median(bests),
        clip_at_lag=_median([scores[best] for scores, best in zip(own, bests, strict=True)]),
    )


def swap_truths(pairs: list[Pair]) -> list[Pair]:
    """What is seen in each clip with the truth of every other one: what sync is where there is none."""
    return [(seen, truth) for i, (seen, _) in enumerate(pairs) for j, (_, truth) in enumerate(pairs) if i != j]


def judge_silence(pairs: list[Pair], *, shut: float = 0.12) -> tuple[float, int]:
    """Share of the frames of silence in which lips are seen less than `shut` apart, and how many such frames there are.

    Silence: a true opening under 0.02, and none over 0.05 within 2 frames on either side. nan where there is none.
    """
    seen, truth = (np.concatenate(side) for side in zip(*(_overlap(*pair, 0) for pair in pairs), strict=True))
    around = [ndimage.maximum_filter1d(_overlap(*pair, 0)[1], 5, mode="nearest") for pair in pairs]
    silent = (truth < 0.02) & (np.concatenate(around) <= 0.05)
    return (float((seen[silent] < shut).mean()) if silent.any() else float("nan")), int(silent.sum())


def judge_colours(reading: Reading, portrait: Reading) -> dict[str, float]:
    """CIEDE2000 of each part's mean colour over all frames against the portrait's; portrait: its own reading."""
    return {
        part: float(ciede2000(lab(getattr(reading, part).mean(0)), lab(getattr(portrait, part).mean(0))))
        for part in PARTS
    }


def follow_colours(reading: Reading, portrait: Reading) -> dict[str, np.ndarray]:
    """(F,) CIEDE2000 of each part's colour in each frame against the portrait's."""
    return {part: ciede2000(lab(getattr(reading, part)), lab(getattr(portrait, part).mean(0))) for part in PARTS}


def follow_sync(seen: np.ndarray, truth: np.ndarray, *, block: int = 100) -> np.ndarray:
    """(n,) correlation, without delay, in each whole block of frames; nan in one where nobody speaks."""
    seen, truth = _overlap(seen, truth, 0)
    starts = range(0, len(seen) - block + 1, block)
    return np.array([correlate(seen[start : start + block], truth[start : start + block]) for start in starts])


def judge_drift(values: np.ndarray, *, every: int = 1, ends: int = 200) -> Drift:
    """How values, one for each `every` frames, change along a video; nan among them are left out.

    ends: frames at either end whose means are compared; half the video where it is shorter than two of them.
    """
    values = np.asarray(values, np.float64)
    near = max(1, min(ends // every, len(values) // 2))
    first, last = (_mean(part) for part in (values[:near], values[-near:]))
    known = np.isfinite(values)
    times = (np.arange(len(values)) * every / 100)[known]
    times -= times.mean() if len(times) else 0
    spread = float((times**2).sum())
    slope = float((times * values[known]).sum()) / spread if spread else float("nan")
    return Drift(slope=slope, first=first, last=last, change=last - first)


def response(asked: str, reading: Reading, neutral: Reading) -> float:
    """How far a performance went the way that was asked for; it did so where this exceeds BARS[asked].

    smile, frown: mean smile beyond that of the same puppet's neutral performance; turns: the head's extreme angle in
    degrees, against the direction negative; raise hand: the most that is seen of one; zooms: of the last five frames,
    beyond 1. Extremes are taken of medians of five frames, so that no single misread frame decides.
    """
    if asked in ("smile", "frown"):
        return (1 if asked == "smile" else -1) * float(reading.smile.mean() - neutral.smile.mean())
    if asked in ("turn left", "turn right"):
        yaw = ndimage.median_filter(reading.yaw, 5, mode="nearest")
        return (1 if asked == "turn right" else -1) * float(yaw[np.abs(yaw).argmax()])
    if asked == "raise hand":
        return float(ndimage.median_filter(reading.hand, 5, mode="nearest").max())
    assert asked in ("zoom in", "zoom out"), asked
    return (1 if asked == "zoom in" else -1) * float(np.median(reading.zoom[-5:]) - 1)


def judge_control(trials: list[Trial]) -> dict[str, Control]:
    """By what was asked for. Every puppet has a NEUTRAL trial.

    chance: the same judgement on videos whose prompts asked for something else of the same family or for nothing; the
    latter not for emotions, which are measured from there. It is what a model that ignores its prompt would reach.
    """
    neutral = {trial.puppet: trial.reading for trial in trials if trial.asked == NEUTRAL}
    found = {}
    for family, kinds in FAMILIES.items():
        for kind in (kind for kind in kinds if any(trial.asked == kind for trial in trials)):
            strangers = {*kinds, NEUTRAL} - {kind} - ({NEUTRAL} if family == "emotion" else set())
            mine, others = (
                np.array([response(kind, t.reading, neutral[t.puppet]) for t in trials if t.asked in asked])
                for asked in ({kind}, strangers)
            )
            bar = BARS[kind]
            found[kind] = Control(
                trials=len(mine),
                success=float((mine > bar).mean()),
                chance=float((others > bar).mean()) if len(others) else float("nan"),
                others=len(others),
                response=float(mine.mean()),
                bar=bar,
            )
    return found


def judge_seams(clips: list[tuple[np.ndarray, tuple[int, ...]]]) -> Seams:
    """clips: (F - 1,) mean absolute differences of neighbouring frames, and the frames at which sub-clips join.

    Sub-clips share the frame c at a cut, so the step that crosses the joint is the one from c to c + 1. The video's own
    first and last frame are no joints.
    """
    joints, usual, ratios = [], [], []
    for steps, cuts in clips:
        crossing = np.isin(np.arange(len(steps)), [cut for cut in cuts if cut > 0])
        if crossing.any() and not crossing.all():
            most = float(np.percentile(steps[~crossing], 95))
            usual.append(most)
            joints.extend(steps[crossing])
            ratios.extend(steps[crossing] / max(most, 1e-9))
    above = _mean(np.array(ratios) > 1)
    return Seams(joints=len(joints), joint=_mean(joints), usual=_mean(usual), ratio=_mean(ratios), above=above)


def _overlap(seen: np.ndarray, truth: np.ndarray, lag: int) -> Pair:
    seen, truth = (seen[lag:], truth) if lag >= 0 else (seen, truth[-lag:])
    count = min(len(seen), len(truth))
    return seen[:count], truth[:count]


def _best(scores: dict[int, float]) -> int:
    """The first lag with the highest score; 0 where no score is known."""
    known = {lag: score for lag, score in scores.items() if np.isfinite(score)}
    return max(known, key=known.__getitem__, default=0)


def _median(values: list) -> float:
    return float(np.median(values)) if values else float("nan")


def _mean(values) -> float:
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
