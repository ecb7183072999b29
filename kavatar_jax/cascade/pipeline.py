"""The whole system on one screen: a portrait, a speech and an instruction become a talking video."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from kavatar_jax.cascade.blueprint import at_blueprint_size, draw_blueprint
from kavatar_jax.cascade.denoise import Denoise, denoise
from kavatar_jax.cascade.encode import encode
from kavatar_jax.cascade.film import draw_film
from kavatar_jax.cascade.keyframes import pick_keyframes
from kavatar_jax.cascade.performance import draw_performance, perform
from kavatar_jax.cascade.stitch import decode, stitch
from kavatar_jax.cascade.subclips import render_subclips
from kavatar_jax.cascade.weights import Weights
from kavatar_jax.config import Config
from kavatar_jax.parallel.mesh import current
from kavatar_jax.parallel.sharding import batch_slots
from kavatar_jax.types import Report, Request, Scene, Storyline, Video, silent

Director = Callable[[Request], Storyline]


def generate(
    request: Request, director: Director, weights: Weights, config: Config,
    *, landmarker: Any | None = None, report: Report = silent, denoise: Denoise = denoise,
) -> Video:  # fmt: skip
    """Kling-Avatar's cascade: plan, small blueprint, keyframes, all sub-clips in parallel, one video."""
    storyline = director(request)  # what happens, shot by shot
    conditions = encode(request, storyline, weights, config, report)  # words, voice and face, each computed once
    small = at_blueprint_size(config)
    blueprint = draw_blueprint(conditions, weights, small, report, denoise)  # the whole performance, small
    keyframes = pick_keyframes(blueprint, storyline, conditions, weights, config, report, landmarker)
    clips = render_subclips(keyframes, conditions, weights, config, report, denoise)  # all at once, over the mesh
    return stitch(clips, weights, config, report, frames=conditions.frames, speech=request.speech)


def generate_in_one_pass(
    request: Request, director: Director, weights: Weights, config: Config,
    *, report: Report = silent, denoise: Denoise = denoise,
) -> Video:  # fmt: skip
    """StableAvatar's path: sliding windows over the whole speech at full size."""
    storyline = director(request)
    conditions = encode(request, storyline, weights, config, report)
    performance = draw_performance(conditions, weights, config, report, denoise)  # one finished span after the other
    return stitch(performance, weights, config, report, frames=conditions.frames, speech=request.speech)


def generate_live(
    request: Request, speech: Iterable[np.ndarray], director: Director, weights: Weights, config: Config,
    *, report: Report = silent,
) -> Iterator[np.ndarray]:  # fmt: skip
    """The frames of one pass over speech that is still being spoken; request.speech is empty."""
    storyline = director(request)  # of what will be said, nothing is known
    conditions = encode(request, storyline, weights, config, report)
    group = batch_slots(current())  # as few windows at a time as keep every device busy
    yield from decode(perform(conditions, speech, weights, config, group=group, report=report), weights, config)


def generate_without_speech(
    scene: Scene, weights: Weights, config: Config, *, report: Report = silent, denoise: Denoise = denoise
) -> Video:
    """Plain Wan2.1: a short video in one window, from words and, where given, its first frame, or first and last."""
    film = draw_film(scene, weights, config, report, denoise)
    return stitch(film, weights, config, report, frames=film.frames, speech=None)
