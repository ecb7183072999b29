"""Latents to the frames of one video, made as they are asked for: nothing long is ever held in pixels."""

from collections.abc import Iterable, Iterator

import numpy as np

from kavatar_jax.cascade.weights import Weights
from kavatar_jax.config import Config
from kavatar_jax.models import vae
from kavatar_jax.types import Blueprint, Clips, Performance, Report, Speech, Video


def stitch(
    clips: Clips | Blueprint | Performance, weights: Weights, config: Config, report: Report,
    *, frames: int, speech: Speech | None,
) -> Video:  # fmt: skip
    """One video of so many frames; the frame that two clips share appears once."""
    if isinstance(clips, Clips):
        images = _join(clips, weights, config)
        cuts = tuple(int(cut) for cut in 4 * np.cumsum(np.array(clips.lengths) - 1)[:-1])
    else:
        images, cuts = decode(clips.latents, weights, config), ()
    return Video(images=_counted(images, frames, report), frames=frames, fps=config.fps, speech=speech, cuts=cuts)


def decode(latents: np.ndarray | Iterable[np.ndarray], weights: Weights, config: Config) -> Iterator[np.ndarray]:
    """(T, h, w, C), whole or in pieces -> 4 (T - 1) + 1 frames (H, W, 3) uint8, one by one."""
    for chunk in vae.decode_stream(weights.vae, latents, config.vae):
        yield from chunk


def _join(clips: Clips, weights: Weights, config: Config) -> Iterator[np.ndarray]:
    for i, length in enumerate(clips.lengths):
        frames = decode(clips.latents[i, :length], weights, config)
        if i:
            next(frames)
        yield from frames


def _counted(frames: Iterator[np.ndarray], count: int, report: Report) -> Iterator[np.ndarray]:
    for number, frame in zip(range(count), frames, strict=False):
        yield frame
        report("decoding frames", number + 1, count)
