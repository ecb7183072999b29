"""The inference step: a batch of windows goes from one noise level to the next, all windows and branches at once.

One compiled program serves every length of speech: windows are padded to few batch sizes, and the step is called once per
noise level from the host, so that progress shows and an interrupt is heard. Windows are spread over the mesh's data and
fsdp axes; on each slot `windows_per_batch` of them go through the model together, one group after the other. It is the
velocities that are fused where windows overlap, so that a solver moves one video, whatever it remembers of earlier steps.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.config import Config, DiTConfig, SamplingConfig
from kavatar_jax.diffusion import guidance
from kavatar_jax.diffusion.caching import NO_REUSE, Reuse, name_of, plan_reuse
from kavatar_jax.diffusion.flow import TRAIN_STEPS
from kavatar_jax.diffusion.guidance import Branch
from kavatar_jax.diffusion.solver import History, Move, advance, begin, plan_of
from kavatar_jax.diffusion.windows import Windows, fuse, fusion_weights, overlap_ramp, slot_bucket
from kavatar_jax.models.dit import DiT, Inputs
from kavatar_jax.parallel.mesh import current
from kavatar_jax.parallel.programs import program
from kavatar_jax.parallel.sharding import batch_sharding, batch_slots, constrain, replicated
from kavatar_jax.types import Params, Report

TEXTS = 4  # a bank of prompts holds this many, or a few times that


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


# what the transformer's blocks added to the tokens of every window, (W, S, D), by the name of a branch
Residuals = dict[str, jax.Array]


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
    taken = take_steps(params, x, told, shared, windows, config, sampling, plan_steps(sampling))
    for i, (history, _) in enumerate(taken):
        x = jax.block_until_ready(history.x)
        report(stage, i + 1, sampling.steps)
    return np.asarray(x)


class Step(NamedTuple):
    """One step of a schedule: its row of the solver's plan, the branches of guidance, and what they reuse."""

    move: Move
    branches: tuple[Branch, ...]
    reuse: Reuse


def plan_steps(sampling: SamplingConfig) -> list[Step]:
    """The steps that a run's config asks for."""
    plan = plan_of(sampling)
    branches = [guidance.branches_of(sampling, float(move.sigma)) for move in plan.moves]
    reuses = plan_reuse(plan.sigmas, branches, sampling.cache)
    return [Step(*parts) for parts in zip(plan.moves, branches, reuses, strict=True)]


def take_steps(
    params: Params, x: jax.Array, told: Told, shared: Shared, windows: Windows,
    config: DiTConfig, sampling: SamplingConfig, steps: list[Step],
) -> Iterator[tuple[History, Residuals]]:  # fmt: skip
    """What each step leaves, and the residuals that it keeps; the history is used up by the next."""
    first, later = step_weights(windows, sampling)
    mesh = current()
    history = begin(jax.device_put(x, batch_sharding(mesh)), plan_of(sampling))
    told = jax.device_put(told, batch_sharding(mesh))
    shared = jax.device_put(fill_banks(shared, len(x)), replicated(mesh))
    group = group_size(windows.count, sampling)
    residuals: Residuals = {}
    for i, (move, branches, reuse) in enumerate(steps):
        history, residuals = step(
            params, history, residuals, move, first if i == 0 else later, told, shared,
            config=config, branches=branches, group=group, stride=windows.stride, reuse=reuse,
        )  # fmt: skip
        yield history, residuals


def fill_banks(shared: Shared, slots: int) -> Shared:
    """Texts and views repeat their last ones to fill buckets, so that another storyline needs no other program: several
    views are as many as there are slots for windows."""

    def fill(bank, rows):
        return np.asarray(bank)[np.minimum(np.arange(rows), len(bank) - 1)]

    def fill_views(condition):
        return condition if condition is None or len(condition) == 1 else fill(condition, slots)

    text, worn = fill(shared.text, slot_bucket(len(shared.text), multiple=TEXTS)), shared.worn
    if worn is not None:
        worn = worn._replace(condition=fill_views(worn.condition))
    return shared._replace(text=text, condition=fill_views(shared.condition), worn=worn)


@program(static_argnames=("config", "branches", "group", "stride", "reuse"), donate_argnames="history")
def step(
    params, history: History, residuals: Residuals, move: Move, weights, told: Told, shared: Shared,
    *, config: DiTConfig, branches: tuple[Branch, ...], group: int, stride: int, reuse: Reuse = NO_REUSE,
) -> tuple[History, Residuals]:  # fmt: skip
    """Samples (W, T, h, w, C) at move.sigma -> at the next noise level; velocities are fused by `weights` (W, T).

    residuals: those that the step before kept.
    """
    history = spread(history)

    def guided(windows):
        x, told, reused = windows
        return guided_velocity(params, move, shared, config, branches, x, told, reused, reuse.kept)

    cut, join = _grouped(history.x.shape[0], group)
    reused = {name: residuals[name] for name in reuse.reused}
    velocity, added = jax.tree.map(join, jax.lax.map(guided, jax.tree.map(cut, (history.x, told, reused))))
    kept = {name: constrain((residuals | added)[name], "batch", "tokens", None) for name in reuse.kept}
    return spread(advance(history, fuse(velocity, weights, stride), move)), kept


def guided_velocity(
    params, move: Move, shared: Shared, config: DiTConfig, branches: tuple[Branch, ...], x, told: Told,
    reused: Residuals, kept: tuple[str, ...] = (),
) -> tuple[jax.Array, Residuals]:  # fmt: skip
    """The velocity (G, T, h, w, C) of a group of windows at one noise level, or each at its own; not yet fused.

    reused: residuals of the branches that do not go through the blocks; also returns those, named in `kept`, of the others.
    """
    # what predicts clean latents turns them into a velocity by the timestep, which must then be the exact one
    timestep = move.timestep if config.predicts == "velocity" else move.sigma * TRAIN_STEPS
    fresh = tuple(branch for branch in branches if name_of(branch) not in reused)
    stale = tuple(branch for branch in branches if name_of(branch) in reused)
    parts, added = [], {}
    if fresh:
        velocities, residuals = run_branches(params, timestep, shared, config, fresh, x, told)
        parts.append(guidance.combine(velocities, fresh))
        found = {name_of(branch): residual for branch, residual in zip(fresh, residuals, strict=True)}
        added = {name: found[name] for name in kept if name in found}
    if stale:
        residuals = jnp.stack([reused[name_of(branch)] for branch in stale])
        velocities, _ = run_branches(params, timestep, shared, config, stale, x, told, residuals)
        parts.append(guidance.combine(velocities, stale))
    return sum(parts[1:], parts[0]), added


def branch_velocities(params, timestep, shared: Shared, config: DiTConfig, branches: tuple[Branch, ...], x, told: Told):
    """Velocities (branches, G, T, h, w, C) of a group of windows."""
    return run_branches(params, timestep, shared, config, branches, x, told)[0]


def run_branches(
    params, timestep, shared: Shared, config: DiTConfig, branches: tuple[Branch, ...], x, told: Told, residuals=None
):
    """Velocities (branches, G, T, h, w, C) of a group of windows, and what the blocks added to their tokens,
    (branches, G, S, D); windows and their branches are one batch. residuals: added instead of running the blocks."""
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
        residual=None if residuals is None else jnp.moveaxis(residuals, 0, 1).reshape(G * n, *residuals.shape[2:]),
    )
    outputs = DiT(config).apply({"params": params}, inputs)

    def by_branch(leaf):
        return jnp.moveaxis(leaf.reshape(G, n, *leaf.shape[1:]), 1, 0)

    return by_branch(outputs.velocity), by_branch(outputs.last - outputs.tokens)


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


@program(static_argnames="shape")
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
