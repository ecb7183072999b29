"""The inference step: a batch of windows goes from one noise level to the next, all windows and branches at once.

One compiled program serves every length of speech: windows are padded to few batch sizes, and the step is called once per
noise level from the host, so that progress shows and an interrupt is heard. Windows are spread over the mesh's data and
fsdp axes; on each slot `windows_per_batch` of them go through the model together, one group after the other. It is the
velocities that are fused where windows overlap, so that a solver moves one video, whatever it remembers of earlier steps.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.config import Config, DiTConfig, SamplingConfig
from kavatar_jax.diffusion import guidance
from kavatar_jax.diffusion.flow import TRAIN_STEPS
from kavatar_jax.diffusion.guidance import Branch
from kavatar_jax.diffusion.solver import History, Move, advance, begin, plan_of
from kavatar_jax.diffusion.windows import Windows, fuse, fusion_weights, overlap_ramp
from kavatar_jax.models.dit import DiT, Inputs
from kavatar_jax.parallel.mesh import current
from kavatar_jax.parallel.sharding import batch_sharding, batch_slots, constrain, replicated
from kavatar_jax.types import Params, Report


class Told(NamedTuple):
    """What each of W windows is told. `prompt`, `negative` and `view` are rows of the banks that windows share.

    speech: (W, L, D); slices: (W, T, A); both None where nobody speaks; prompt, negative, view: (W,); frames: (W,) or None
    """

    speech: Any
    slices: Any
    prompt: jax.Array
    negative: jax.Array
    view: jax.Array
    frames: jax.Array | None


class Pictures(NamedTuple):
    """What windows see. image: (1, L, D); condition: (N, T, h, w, 20); None where the transformer is not told of them."""

    image: Any
    condition: Any


class Shared(NamedTuple):
    """What windows have in common. text: (N, L, D); image: (1, L, D); condition: (N, T, h, w, 20); director: (1, L, D).

    All but the text are None where the transformer is not told of them. worn: image and condition as they are where the
    pictures have suffered, None where no branch asks for it. Where the windows of a group are of several videos, image and
    director have a row for each window.
    """

    text: jax.Array
    image: Any
    condition: Any
    director: jax.Array | None
    worn: Pictures | None = None


class Denoise(Protocol):
    """A way of denoising: `denoise` below, or one that does the windows of several videos together."""

    def __call__(
        self, params: Params, x: jax.Array, told: Told, shared: Shared, windows: Windows,
        config: DiTConfig, sampling: SamplingConfig, *, stage: str, report: Report,
    ) -> np.ndarray: ...  # fmt: skip


def denoise(
    params: Params, x: jax.Array, told: Told, shared: Shared, windows: Windows,
    config: DiTConfig, sampling: SamplingConfig, *, stage: str, report: Report,
) -> np.ndarray:  # fmt: skip
    """Take noise (slots, T, h, w, C) to latents of the same shape on the host, overlaps fused; x is used up."""
    plan = plan_of(sampling)
    first, later = step_weights(windows, sampling)
    mesh = current()
    history = begin(jax.device_put(x, batch_sharding(mesh)), plan)
    told, shared = jax.device_put(told, batch_sharding(mesh)), jax.device_put(shared, replicated(mesh))
    group = group_size(windows.count, sampling)
    for i, move in enumerate(plan.moves):
        history = step(
            params, history, move, first if i == 0 else later, told, shared,
            config=config, branches=guidance.branches_of(sampling, float(move.sigma)), group=group, stride=windows.stride,
        )  # fmt: skip
        jax.block_until_ready(history)
        report(stage, i + 1, sampling.steps)
    return np.asarray(history.x)


@functools.partial(jax.jit, static_argnames=("config", "branches", "group", "stride"), donate_argnames="history")
def step(
    params, history: History, move: Move, weights, told: Told, shared: Shared,
    *, config: DiTConfig, branches: tuple[Branch, ...], group: int, stride: int,
) -> History:  # fmt: skip
    """Samples (W, T, h, w, C) at move.sigma -> at the next noise level; velocities are fused by `weights` (W, T)."""
    history = spread(history)

    def guided(windows):
        return guided_velocity(params, move, shared, config, branches, *windows)

    cut, join = _grouped(history.x.shape[0], group)
    velocity = join(jax.lax.map(guided, jax.tree.map(cut, (history.x, told))))
    return spread(advance(history, fuse(velocity, weights, stride), move))


def guided_velocity(params, move: Move, shared: Shared, config: DiTConfig, branches: tuple[Branch, ...], x, told: Told):
    """The velocity (G, T, h, w, C) of a group of windows at one noise level, or each at its own; not yet fused."""
    # what predicts clean latents turns them into a velocity by the timestep, which must then be the exact one
    timestep = move.timestep if config.predicts == "velocity" else move.sigma * TRAIN_STEPS
    return guidance.combine(branch_velocities(params, timestep, shared, config, branches, x, told), branches)


def branch_velocities(params, timestep, shared: Shared, config: DiTConfig, branches: tuple[Branch, ...], x, told: Told):
    """Velocities (branches, G, T, h, w, C) of a group of windows; windows and their branches are one batch."""
    G, n = x.shape[0], len(branches)
    positive = jnp.asarray([branch.positive for branch in branches])
    heard = jnp.asarray([branch.heard for branch in branches])
    silent = np.array([branch.silent for branch in branches])
    worn = np.array([branch.worn for branch in branches])
    gains = np.array([branch.audio_gain for branch in branches], np.float32)
    text = jnp.where(positive, told.prompt[:, None], told.negative[:, None]).reshape(-1)

    def per_branch(leaf):
        return None if leaf is None else jnp.repeat(leaf, n, axis=0)

    def for_all(leaf):
        return None if leaf is None else per_branch(jnp.broadcast_to(leaf, (G, *leaf.shape[1:])))

    def in_some(chosen, leaf, other):
        return jnp.where(np.tile(chosen, G).reshape(-1, *[1] * (leaf.ndim - 1)), other, leaf)

    def seen(pictures):
        condition = None if pictures.condition is None else per_branch(pictures.condition[told.view])
        return Pictures(for_all(pictures.image), condition)

    speech, pictures = per_branch(told.speech), seen(shared)
    if silent.any():
        speech = in_some(silent, speech, 0)
    if worn.any():
        pictures = jax.tree.map(functools.partial(in_some, worn), pictures, seen(shared.worn))
    inputs = Inputs(
        latents=per_branch(x),
        timestep=per_branch(jnp.broadcast_to(timestep, (G,))),
        text=shared.text[text],
        condition=pictures.condition,
        image=pictures.image,
        speech=speech,
        slices=per_branch(told.slices),
        heard=jnp.tile(heard, G),
        director=for_all(shared.director),
        frames=per_branch(told.frames),
        audio_gain=jnp.tile(gains, G) if (gains != 1).any() else None,
    )
    velocity = DiT(config).apply({"params": params}, inputs).velocity
    return jnp.moveaxis(velocity.reshape(G, n, *x.shape[1:]), 1, 0)


def group_size(count: int, sampling: SamplingConfig) -> int:
    """How many of `count` windows go through the model at once, over all slots of the mesh; batches are multiples of it."""
    slots = batch_slots(current())
    return slots * min(sampling.windows_per_batch, -(-count // slots))


def step_weights(windows: Windows, sampling: SamplingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Fusion weights of the first step and of all later ones; only the released sampler treats the first apart."""
    overlap = windows.length - windows.stride
    later = fusion_weights(windows, overlap_ramp(overlap, sampling.fusion))
    return (fusion_weights(windows, None) if sampling.indexing == "released" else later), later


def draw_noise(seed: int, windows: Windows, config: Config) -> jax.Array:
    """(slots, T, h, w, C) float32; a frame's noise depends on the seed and its number, not on the video's length."""
    return noise_of_frames(seed, windows.starts[:, None] + np.arange(windows.length), config)


def noise_of_frames(seed: int, frames_WT: np.ndarray, config: Config) -> jax.Array:
    """(W, T, h, w, C) float32: the noise of these latent frames."""
    shape = (config.height // config.vae.side, config.width // config.vae.side, config.vae.latent_channels)
    return _draw(jax.random.key(seed), frames_WT, shape)


@functools.partial(jax.jit, static_argnames="shape")
def _draw(key, frames_WT, shape):
    def draw(frame):
        return jax.random.normal(jax.random.fold_in(key, frame), shape)

    return spread(jax.vmap(jax.vmap(draw))(frames_WT))


def spread(windows):
    """Every (W, T, h, w, C) of a tree with its windows over the batch axes of the mesh."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch", None, None, None, None), windows)


def _grouped(count: int, group: int):
    """(W, ...) <-> (W / group, group, ...), every group taking the same share from each slot of the mesh."""
    slots = batch_slots(jax.sharding.get_abstract_mesh())

    def cut(leaf):
        parts = leaf.reshape(slots, count // group, group // slots, *leaf.shape[1:])
        return jnp.moveaxis(parts, 1, 0).reshape(count // group, group, *leaf.shape[1:])

    def join(leaf):
        parts = leaf.reshape(count // group, slots, group // slots, *leaf.shape[2:])
        return jnp.moveaxis(parts, 0, 1).reshape(count, *leaf.shape[2:])

    return cut, join
