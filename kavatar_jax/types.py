"""The nouns that flow through the system, and the legend of axis letters.

    B batch or clips      F video frames        T latent frames      H W height, width    C channels
    S video tokens        L context tokens      A audio tokens per latent frame           D width
    N heads               K head size           E mlp width          R LoRA rank          P patch values

A tensor whose shape is not obvious carries its letters as a suffix (`x_BSD`); einsum strings use the same letters.
Videos and latents are channels-last, (B, F, H, W, C) and (B, T, H, W, C). Pixels are RGB: uint8 in files and at the
borders of the package, float32 in [-1, 1] inside.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Params = dict  # a plain nested dict of arrays

SAMPLE_RATE = 16_000  # Hz; what every speech encoder of the family listens at


@dataclass(frozen=True, kw_only=True)
class Speech:
    """A recording as the models hear it.

    samples: (n,) float32 mono at SAMPLE_RATE, in [-1, 1]
    path: the file it came from, whose own sound is muxed into the video; None if it was made in memory
    """

    samples: np.ndarray
    path: Path | None = None

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for. portrait: (H, W, 3) uint8, already fitted to the size of the video."""

    portrait: np.ndarray
    speech: Speech
    instruction: str = ""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A plain video that the user asked for. first, last: its frames there, (H, W, 3) uint8 at its size, where given."""

    instruction: str
    first: np.ndarray | None = None
    last: np.ndarray | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One span of the performance and what happens in it. start, end: seconds, end exclusive."""

    start: float
    end: float
    prompt: str
    negative: str = ""
    action: str = ""
    emotion: str = "neutral"
    arousal: float = 0.5
    camera: str = "static"


@dataclass(frozen=True, kw_only=True)
class Storyline:
    """The plan: one sentence for the whole, shots that tile [0, duration) without gaps.

    hidden: (L, D) hidden states of the director that wrote it, where it has any.
    """

    summary: str
    shots: tuple[Shot, ...]
    hidden: np.ndarray | None = field(default=None, repr=False, compare=False)


Report = Callable[[str, int, int], None]  # (stage, steps done, steps in all): how long work shows its progress


def silent(stage: str, done: int, total: int) -> None:
    """A Report that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Everything the generator is told, as arrays, each computed once.

    frames: length of the video; fps: frames a second
    texts: (N, L, D) encoded prompts, zero rows after the last token
    spans: (shots, 2) seconds; prompts, negatives: (shots,) rows of `texts`
    face: (1, L, D) image tokens of the portrait; face_embedding: (E,) what identity is judged by
    worn_face: the tokens of the portrait as if it had suffered, None where nothing is guided away from it
    portrait: (H, W, 3) uint8 at the size of the video; speech: (n,) samples
    director: (1, L, D) hidden states, or None
    """

    frames: int
    fps: int
    seed: int
    texts: np.ndarray
    spans: np.ndarray
    prompts: np.ndarray
    negatives: np.ndarray
    face: np.ndarray
    face_embedding: np.ndarray
    portrait: np.ndarray
    speech: np.ndarray
    director: np.ndarray | None
    worn_face: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """The whole performance. latents: (T, h, w, C) of `frames` video frames of width x height pixels."""

    latents: np.ndarray
    frames: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Performance:
    """The whole performance as it is made. latents: (t, h, w, C) each, one span after the other; made when asked for."""

    latents: Iterator[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Keyframes:
    """The frames that neighbouring clips share. images: (K, H, W, 3) uint8; cuts: (K,) their frame numbers, first 0."""

    images: np.ndarray
    cuts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Latents with a leading clip axis. latents: (B, T, h, w, C); lengths: latent frames of each that are kept.

    A clip begins with the frame that the one before ends with.
    """

    latents: np.ndarray
    lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video on its way to a file. images: (H, W, 3) uint8 each, made as they are asked for; frames: how many.

    cuts: the frames that sub-clips share
    """

    images: Iterator[np.ndarray]
    frames: int
    fps: int
    speech: Speech | None
    cuts: tuple[int, ...] = ()
