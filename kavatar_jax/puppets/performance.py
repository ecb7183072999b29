"""How a puppet acts: mouth shapes and a script go in, a state for every frame comes out.

A script says how it feels, what it does and what the camera does; breathing, blinking, glances, sway and the small
nods that go with stressed syllables come of themselves. All motion is smooth in time and a pure function of the seed.
"""

from dataclasses import dataclass

import numpy as np

from kavatar_jax.puppets.articulation import Phone
from kavatar_jax.puppets.state import MOUTH, RANGES, column, rest_state

EMOTIONS = ("smile", "neutral", "frown")
ACTIONS = ("turn left", "turn right", "nod", "shake head", "raise hand", "wave", "lean in", "lean back", "tilt head")
CAMERAS = ("static", "zoom in", "zoom out", "pan left", "pan right")


@dataclass(frozen=True)
class Action:
    """Something done once. name: one of ACTIONS; start, seconds: when and for how long; side: -1 left, 1 right."""

    name: str
    start: float
    seconds: float
    side: int = 1


@dataclass(frozen=True, kw_only=True)
class Script:
    """emotion: one of EMOTIONS; arousal: 0 calm .. 1 excited; camera: one of CAMERAS; pan left shows what lies further
    left, so that the puppet moves to the right of the picture."""

    emotion: str = "neutral"
    arousal: float = 0.5
    camera: str = "static"
    actions: tuple[Action, ...] = ()

    def __post_init__(self):
        for what, value, known in (
            ("emotion", self.emotion, EMOTIONS),
            ("camera", self.camera, CAMERAS),
            *(("action", action.name, ACTIONS) for action in self.actions),
        ):
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}; known are {', '.join(known)}")


def sample_script(rng: np.random.Generator, seconds: float) -> Script:
    """Something to act for a clip: about one action in five seconds, in three clips of ten none at all."""
    actions = []
    slots = max(1, round(seconds / 5))
    for slot in range(slots):
        if rng.random() < 0.7:
            length = min(seconds / slots * rng.uniform(0.7, 0.95), rng.uniform(1.8, 3.5))
            start = seconds / slots * slot + rng.uniform(0.0, max(seconds / slots - length, 0.0))
            actions.append(Action(str(rng.choice(ACTIONS)), start, length, int(rng.choice([-1, 1]))))
    return Script(
        emotion=str(rng.choice(EMOTIONS, p=(0.4, 0.35, 0.25))),
        arousal=float(rng.uniform(0, 1)),
        camera=str(rng.choice(CAMERAS, p=(0.4, 0.2, 0.16, 0.12, 0.12))),
        actions=tuple(actions),
    )


def perform(
    mouth: np.ndarray, script: Script, *, fps: float, seed: int, phones: list[Phone] | None = None
) -> np.ndarray:
    """(F, K) float32 state. mouth: (F, 3) opening, width, teeth; phones: whose stresses the head follows, if known."""
    rng = np.random.default_rng([seed, 0xAC])
    frames = len(mouth)
    times = (np.arange(frames) + 0.5) / fps
    state = rest_state(frames)
    track = {name: column(state, name) for name in RANGES}
    for name, values in zip(MOUTH, mouth.T, strict=True):
        track[name][:] = values
    _idle(track, times, 0.5 + script.arousal, rng)
    _blink(track, times, rng)
    _glance(track, times, rng)
    _feel(track, times, script, rng)
    _stress(track, times, phones or [], script, rng)
    for action in script.actions:
        _act(track, times, action, rng)
    _film(track, times, script.camera, rng)
    lows, highs = np.array(list(RANGES.values()), np.float32).T
    return np.clip(state, lows, highs)


def _idle(track, times, energy: float, rng):
    """Slow wandering of head and body, breath, and light that is never quite steady."""
    for name, size, period in (
        ("yaw", 3.5, 3.0),
        ("pitch", 2.2, 2.6),
        ("roll", 2.2, 3.6),
        ("sway_x", 0.022, 4.0),
        ("sway_y", 0.008, 3.0),
        ("lean", 0.12, 4.0),
        ("brow_raise", 0.12, 2.0),
    ):
        track[name] += size * (0.6 + 0.4 * energy) * _wander(times, period, rng)
    track["breath"][:] = 0.5 - 0.5 * np.cos(2 * np.pi * (times / rng.uniform(2.8, 4.5) + rng.uniform()))
    track["light"][:] = rng.uniform(-0.5, 0.5) + 0.12 * _wander(times, 5.0, rng)
    track["light_x"][:] = rng.uniform(-0.8, 0.8) + 0.1 * _wander(times, 6.0, rng)


def _blink(track, times, rng):
    """About one blink in three seconds; lids fall in 80 ms and rise in 160."""
    at = rng.uniform(-1.0, 3.0)
    while at < times[-1] + 0.2:
        since = times - at
        lids = np.where(since < 0, 1 + since / 0.08, 1 - (since - 0.05) / 0.16)
        track["blink"][:] = np.maximum(track["blink"], _ease(np.clip(np.minimum(lids, 1), 0, 1)))
        at += 0.6 + rng.exponential(2.6)


def _glance(track, times, rng):
    """Eyes rest on the camera and jump elsewhere now and then, within 60 ms."""
    at, x, y = 0.0, 0.0, 0.0
    while at < times[-1]:
        away = rng.random() < 0.4
        new_x, new_y = (rng.uniform(-0.8, 0.8), rng.uniform(-0.5, 0.5)) if away else rng.normal(0, 0.06, 2)
        moved = _ease(np.clip((times - at) / 0.06, 0, 1)) if at > 0 else np.ones(len(times))
        track["gaze_x"] += (moved * (new_x - x)).astype(np.float32)
        track["gaze_y"] += (moved * (new_y - y)).astype(np.float32)
        x, y = new_x, new_y
        at += rng.uniform(0.4, 0.9) if away else rng.uniform(0.8, 2.5)


def _feel(track, times, script: Script, rng):
    """The emotion on mouth and brows, swelling and ebbing a little."""
    low, high = {"smile": (0.6, 0.95), "neutral": (-0.08, 0.12), "frown": (-0.95, -0.6)}[script.emotion]
    mood = rng.uniform(low, high)
    rise = _ease(np.clip(times / 0.6, 0, 1)) if rng.random() < 0.3 else 1.0
    track["smile"][:] = mood * rise + 0.08 * _wander(times, 1.8, rng)
    angry = script.emotion == "frown" and script.arousal > 0.55
    tilt = {"smile": 0.1, "neutral": 0.0, "frown": -0.75 if angry else 0.75}[script.emotion]
    track["brow_tilt"][:] = tilt * rise + 0.08 * _wander(times, 2.2, rng)
    track["brow_raise"] += {"smile": 0.25, "neutral": 0.0, "frown": -0.35 if angry else 0.1}[script.emotion] * rise


def _stress(track, times, phones: list[Phone], script: Script, rng):
    """Brows rise and the head dips with the syllables that carry a phrase."""
    for phone in phones:
        if phone.stress < 2:
            continue
        beat = np.exp(-(((times - 0.5 * (phone.start + phone.end)) / 0.13) ** 2))
        track["pitch"] += 2.6 * (0.5 + script.arousal) * rng.uniform(0.3, 1.2) * beat
        track["brow_raise"] += 0.45 * rng.uniform(0, 1) * beat
        track["roll"] += rng.normal(0, 1.0) * beat


def _act(track, times, action: Action, rng):
    since = times - action.start
    ramp = min(0.7, 0.35 * action.seconds)
    held = _ease(np.clip(since / ramp, 0, 1)) * _ease(np.clip((action.seconds - since) / ramp, 0, 1))
    if action.name in ("turn left", "turn right"):
        side = -1 if action.name == "turn left" else 1
        track["yaw"] += side * rng.uniform(18, 25) * held
        track["gaze_x"] += 0.3 * side * held
    elif action.name == "nod":
        track["pitch"] += rng.uniform(7, 10) * held * np.sin(2 * np.pi * 1.7 * since)
    elif action.name == "shake head":
        track["yaw"] += rng.uniform(11, 15) * held * np.sin(2 * np.pi * 1.5 * since)
    elif action.name in ("raise hand", "wave"):
        track["hand"][:] = np.maximum(track["hand"], held)
        track["hand_side"][:] = np.where(held > 0, action.side, track["hand_side"])
        track["wave"] += (0.9 if action.name == "wave" else 0.12) * held * np.sin(2 * np.pi * 1.6 * since)
    elif action.name in ("lean in", "lean back"):
        track["lean"] += (0.9 if action.name == "lean in" else -0.9) * held
    else:
        track["roll"] += action.side * rng.uniform(9, 12) * held


def _film(track, times, camera: str, rng):
    """A camera move of which the clip is a stretch: it may have begun before, at zoom 1, and may end after it.

    Windows of a long video are such stretches; of moves that all begin with their clip, every window would begin anew.
    """
    long = rng.uniform(1, 3)  # in clips
    done = _ease((rng.uniform(0, long - 1) + times / (times[-1] + times[0])) / long)
    if camera == "zoom in":
        track["zoom"] += rng.uniform(0.16, 0.26) * done
    elif camera == "zoom out":
        track["zoom"] -= rng.uniform(0.1, 0.14) * done
    elif camera in ("pan left", "pan right"):
        track["pan_x"] += (-1 if camera == "pan left" else 1) * rng.uniform(0.14, 0.22) * done


def _wander(times, period: float, rng) -> np.ndarray:
    """Smooth noise of about unit size: five sines whose periods lie around the given one."""
    rates = rng.uniform(0.4, 1.6, 5) / period
    phases = rng.uniform(0, 2 * np.pi, 5)
    return np.sin(2 * np.pi * rates * times[:, None] + phases).sum(1) * np.sqrt(2 / 5)


def _ease(t):
    """From 0 to 1 with no jerk at either end (minimum-jerk polynomial)."""
    return t * t * t * (10 - 15 * t + 6 * t * t)
