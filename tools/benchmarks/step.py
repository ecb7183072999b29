"""One sampling step over all windows: ours beside the released order of work, on the same untrained networks.

The released order: for every window encode its speech anew, run three branches one after the other, take the Euler step;
then blend the overlaps. Ours: speech encoded once per video, windows and branches batched, one program.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import demo, stableavatar
from kavatar_jax.cascade import denoise
from kavatar_jax.cascade.blueprint import plan_windows
from kavatar_jax.cascade.denoise import Shared, Told
from kavatar_jax.cascade.hear import hear, spans_of_windows
from kavatar_jax.cascade.weights import Weights, draw_untrained
from kavatar_jax.config import Config
from kavatar_jax.diffusion import guidance
from kavatar_jax.diffusion.solver import History, Move, euler, plan_of
from kavatar_jax.diffusion.windows import Windows, fuse
from kavatar_jax.types import SAMPLE_RATE
from tools.benchmarks.paired import in_turns, ratio

STEPS = 2  # taken by both orders for the comparison of their latents
AGREEMENT = 1e-3  # of their standard deviation; guidance multiplies rounding differences by up to 12 in each step


def _wide() -> Config:
    """1.3B's width and wav2vec2-base, cut to two layers and 64 x 64 pixels."""
    small, full = demo.tiny(), stableavatar.config()
    dit = replace(full.dit, layers=2, dtype="float32", param_dtype="float32")
    sampling = replace(full.sampling, windows_per_batch=2)
    return replace(full, name="1.3B wide", width=64, height=64, dit=dit, text=small.text, sampling=sampling)


SIZES = {"tiny": demo.tiny(), "1.3B wide": _wide()}


class Video(NamedTuple):
    """Everything a step needs that does not change from step to step."""

    config: Config
    weights: Weights
    windows: Windows
    samples: np.ndarray
    told: Told
    shared: Shared


def sampling_step(*, rounds: int, windows: int = 6, names: tuple[str, ...] = tuple(SIZES)) -> Iterator[dict]:
    """One row for each size: seconds per step of ours, with this step's share of encoding speech once, and of the released.

    speech: what encoding speech anew in every step costs the released order, as a factor; batching: how many times as long
    one window and branch at a time takes as all in one program. 1 / ratio is about their product.
    """
    for name in names:
        video = make_video(SIZES[name], windows)
        config = video.config.sampling
        listen = partial(_listen, video)
        ways = {
            "ours": partial(_take_steps, partial(_ours, video), video, 1),
            "released": partial(_take_steps, partial(_released, video, listen), video, 1),
            "remembering": partial(_take_steps, partial(_released, video, partial(_recall, video)), video, 1),
            "encoding": partial(_listen_to_all, video),
        }
        difference = _difference(video)
        seconds = in_turns(ways, rounds=rounds)
        ours = [a + b / config.steps for a, b in zip(seconds["ours"], seconds["encoding"], strict=True)]
        median, low, high = ratio(ours, seconds["released"])
        yield {
            "size": name,
            "windows": video.windows.count,
            "ours": statistics.median(ours),
            "theirs": statistics.median(seconds["released"]),
            "ratio": median,
            "spread": (low, high),
            "speech": ratio(seconds["released"], seconds["remembering"]).median,
            "batching": ratio(seconds["remembering"], seconds["ours"]).median,
            "difference": difference,
            "agree": difference <= AGREEMENT,
        }


def make_video(config: Config, count: int) -> Video:
    """Untrained networks and made-up conditions for a video of `count` windows."""
    sampling, rng = config.sampling, np.random.default_rng(0)
    latents = sampling.window_latents + (count - 1) * (sampling.window_latents - sampling.overlap)
    length = round((4 * (latents - 1) + 1) * SAMPLE_RATE / config.fps)
    samples = 0.1 * rng.standard_normal(length, np.float32)
    weights = draw_untrained(config, 0, None)
    windows = plan_windows(length, config)
    assert windows.count == count
    speech, slices = hear(samples, spans_of_windows(windows, length, config.fps, sampling), weights.speech, config)
    dit = config.dit
    seen = (sampling.window_latents, config.height // config.vae.side, config.width // config.vae.side)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    first = jnp.zeros(windows.slots, jnp.int32)
    told = Told(jnp.asarray(speech), jnp.asarray(slices), prompt=first, negative=first + 1, view=first, frames=None)
    shared = Shared(
        text=draw(2, dit.text_length, dit.text_width),
        image=draw(1, 257, dit.image_width),
        condition=draw(1, *seen, dit.in_channels - dit.out_channels),
        director=None,
    )
    return Video(config, weights, windows, samples, told, shared)


def _difference(video: Video) -> float:
    """How far apart the latents of both orders are after some steps, in standard deviations."""
    ours = _take_steps(partial(_ours, video), video, STEPS)
    theirs = _take_steps(partial(_released, video, partial(_listen, video)), video, STEPS)
    return float(np.abs(ours - theirs).max() / theirs.std())


def _take_steps(step: Callable, video: Video, count: int) -> np.ndarray:
    """`count` steps from the same noise."""
    sampling = video.config.sampling
    plan = plan_of(sampling)
    _, weights = denoise.step_weights(video.windows, sampling)
    x = denoise.draw_noise(0, video.windows, video.config)
    for move, sigma_next in zip(plan.moves[:count], plan.sigmas[1:], strict=False):
        x = step(x, move, sigma_next, weights)
    return np.asarray(x[: video.windows.count])


def _ours(video: Video, x, move: Move, _, weights):
    config = video.config
    return denoise.step(
        video.weights.dit, History(x, None, None, None), {}, move, weights, video.told, video.shared,
        config=config.dit, branches=_branches(config), group=denoise.group_size(video.windows.count, config.sampling),
        stride=video.windows.stride,
    )[0].x  # fmt: skip


def _released(video: Video, listen: Callable, x, move: Move, sigma_next, weights):
    """Window by window and branch by branch; `listen` gives a window's speech features and slices."""
    branches, moved = _branches(video.config), []
    for k in range(video.windows.slots):
        speech, slices = listen(k)
        told = jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], video.told)._replace(speech=speech, slices=slices)
        mine = x[k : k + 1]
        velocities = [
            _velocity(video.weights.dit, move.timestep, video.shared, video.config.dit, (branch,), mine, told)[0]
            for branch in branches
        ]
        moved.append(_guide(jnp.stack(velocities), mine, move.sigma, sigma_next, branches))
    return _fuse(jnp.concatenate(moved), weights, video.windows.stride)


def _listen(video: Video, window: int):
    """Encode a window's speech."""
    config = video.config
    spans = spans_of_windows(video.windows, len(video.samples), config.fps, config.sampling)
    speech, slices = hear(video.samples, spans[window : window + 1], video.weights.speech, config)
    return jnp.asarray(speech), jnp.asarray(slices)


def _listen_to_all(video: Video):
    config = video.config
    spans = spans_of_windows(video.windows, len(video.samples), config.fps, config.sampling)
    return hear(video.samples, spans, video.weights.speech, config)


def _recall(video: Video, window: int):
    return video.told.speech[window : window + 1], video.told.slices[window : window + 1]


def _branches(config: Config) -> tuple[guidance.Branch, ...]:
    return guidance.branches_of(config.sampling)


_velocity = jax.jit(denoise.branch_velocities, static_argnums=(3, 4))


@partial(jax.jit, static_argnums=4)
def _guide(velocities, x, sigma, sigma_next, branches):
    return euler(x, guidance.combine(velocities, branches), sigma, sigma_next)


_fuse = jax.jit(fuse, static_argnums=2)
