"""Scenes for puppets that no training has seen, with the truth of their mouths, and how they are watched.

A scene is a request and what it should come to; a performer makes a video of it, whose frames are read in passing.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from kavatar_jax.config import Config
from kavatar_jax.media.audio import load_speech
from kavatar_jax.media.video import write_video
from kavatar_jax.puppets import judge
from kavatar_jax.puppets.articulation import mouth_shapes
from kavatar_jax.puppets.drive import drive
from kavatar_jax.puppets.identity import sample_identity
from kavatar_jax.puppets.measure import Reading, read
from kavatar_jax.puppets.performance import Script
from kavatar_jax.puppets.prompts import describe
from kavatar_jax.puppets.records import SPLITS
from kavatar_jax.puppets.room import record, sample_room
from kavatar_jax.puppets.stage import render_portrait
from kavatar_jax.puppets.voice import sample_voice, utter
from kavatar_jax.types import SAMPLE_RATE, Request, Speech, Video

BREATH = 10  # seconds of one utterance; longer voices say several
BLOCK, LEAD = 200, 12  # frames read at a time, and those before them by which the reader finds head and camera again
STILLS = 8  # of each video, on a contact sheet

Performer = Callable[[Request], Video]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One thing to perform. puppet: number of the held-out look; asked: what the prompt asks for; truth: (F,) opening of
    the mouth in each frame."""

    name: str
    puppet: int
    asked: str
    request: Request
    truth: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What came of a scene. portrait: its own reading; steps: (F - 1,) mean absolute differences of neighbouring frames,
    in levels; stills: the portrait and frames evenly spread."""

    scene: Scene
    reading: Reading
    portrait: Reading
    steps: np.ndarray
    cuts: tuple[int, ...]
    stills: list[np.ndarray]

    @property
    def mouth(self) -> judge.Pair:
        return self.reading.mouth_open, self.scene.truth


def synthetic(
    number: int,
    seconds: float,
    config: Config,
    *,
    asked: str = judge.NEUTRAL,
    script: Script | None = None,
    driven: float = 0.0,
) -> Scene:
    """Held-out puppet `number`, with its held-out voice in a room of its own; what is asked changes the words alone.

    driven: share of the mouth's truth that follows the sound rather than the phones, as in RecordsConfig.
    """
    seed = SPLITS["held out"] + number
    person = sample_identity(seed).person
    samples, truth = say(seed, person, round(seconds * config.fps), config.fps)
    sound = record(samples, sample_room(seed), seed=seed)
    if driven:
        truth = truth + driven * (drive(sound, config.fps)[: len(truth), 0] - truth)
    return _scene(f"puppet {number}", number, sound, truth, config, asked=asked, script=script or Script())


def real(number: int, path: Path, seconds: float, config: Config) -> Scene:
    """Held-out puppet `number` with the beginning of a recording."""
    sound = load_speech(path).samples[: round(seconds * SAMPLE_RATE)]
    truth = drive(sound, config.fps)[:, 0]
    return _scene(path.name, number, sound, truth, config, asked=judge.NEUTRAL, script=Script())


def say(seed: int, person: str, frames: int, fps: int) -> tuple[np.ndarray, np.ndarray]:
    """Clean speech of a held-out voice, and the opening of its mouth in each frame: (n,) samples and (frames,)."""
    voice, samples, truth = sample_voice(seed, person), [], []
    for number, start in enumerate(range(0, frames, BREATH * fps)):
        count = min(BREATH * fps, frames - start)
        utterance = utter(voice, count / fps, seed=seed + (number << 20))  # seeds that no other voice has
        samples.append(utterance.samples)
        truth.append(mouth_shapes(utterance.phones, fps, count)[:, 0])
    return np.concatenate(samples), np.concatenate(truth)


def watch(scene: Scene, perform: Performer, *, fps: int, film: Path | None = None) -> Seen:
    """Perform a scene and read its frames as they come. film: where to keep the video."""
    take = perform(scene.request)
    watcher = _Watcher(scene)
    frames = watcher.follow(take.images)
    if film is None:
        collections.deque(frames, maxlen=0)
    else:
        write_video(film, frames, fps=fps, speech=scene.request.speech)
    portrait = scene.request.portrait
    return Seen(
        scene=scene,
        reading=watcher.reading(),
        portrait=read(portrait[None], portrait),
        steps=np.array(watcher.steps),
        cuts=take.cuts,
        stills=[portrait, *watcher.stills],
    )


class _Watcher:
    """Reads frames in passing, a block at a time, so that no more are held."""

    def __init__(self, scene: Scene):
        self._portrait, self._readings = scene.request.portrait, []
        self._wanted = np.linspace(0, len(scene.truth), STILLS, endpoint=False).astype(int).tolist()
        self._pending: list[np.ndarray] = []
        self._lead = 0  # frames at the head of the pending ones that have been read before
        self.steps: list[float] = []
        self.stills: list[np.ndarray] = []

    def follow(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for number, frame in enumerate(frames):
            if number:
                self.steps.append(float(np.abs(frame.astype(np.int16) - self._pending[-1]).mean()))
            self.stills += [frame] * self._wanted.count(number)
            self._pending.append(frame)
            if len(self._pending) == self._lead + BLOCK:
                self._read()
            yield frame

    def reading(self) -> Reading:
        if len(self._pending) > self._lead:
            self._read()
        names = [field.name for field in fields(Reading)]
        return Reading(**{name: np.concatenate([getattr(one, name) for one in self._readings]) for name in names})

    def _read(self) -> None:
        found = read(np.stack(self._pending), self._portrait)
        self._readings.append(Reading(**{name: values[self._lead :] for name, values in vars(found).items()}))
        self._pending = self._pending[-LEAD:]
        self._lead = len(self._pending)


def _scene(
    name: str, number: int, sound: np.ndarray, truth: np.ndarray, config: Config, *, asked: str, script: Script
) -> Scene:
    seed = SPLITS["held out"] + number
    identity = sample_identity(seed)
    request = Request(
        portrait=render_portrait(identity, height=config.height, width=config.width),
        speech=Speech(samples=sound),
        instruction=describe(identity, script, np.random.default_rng(seed)),
        seed=number,
    )
    return Scene(name=name, puppet=number, asked=asked, request=request, truth=truth)
