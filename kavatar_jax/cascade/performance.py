"""A performance as it is spoken: speech comes in, in pieces of any length, and finished spans of latents go out.

The same numbers as `draw_blueprint` gives for the whole speech at once (diffusion/wavefront.py says why), and neither the
host nor a device holds more than the windows on their way.
"""

import itertools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.cascade import denoise as denoising
from kavatar_jax.cascade.blueprint import draw_blueprint, plan_windows, share, tell
from kavatar_jax.cascade.denoise import (
    Denoise,
    Residuals,
    Shared,
    Told,
    fill_banks,
    group_size,
    guided_velocity,
    noise_of_frames,
    plan_steps,
    spread,
)
from kavatar_jax.cascade.hear import plan_latents, spans_of_frames
from kavatar_jax.cascade.weights import Weights
from kavatar_jax.config import Config, DiTConfig
from kavatar_jax.diffusion.caching import Reuse
from kavatar_jax.diffusion.guidance import Branch
from kavatar_jax.diffusion.solver import History, Move, begin, plan_of
from kavatar_jax.diffusion.wavefront import Level, Wave, begin_level, move_on, pass_level
from kavatar_jax.diffusion.windows import Windows, overlap_ramp
from kavatar_jax.parallel.mesh import current
from kavatar_jax.parallel.programs import program
from kavatar_jax.parallel.sharding import batch_sharding, constrain, replicated
from kavatar_jax.types import Blueprint, Conditions, Performance, Report


def draw_performance(
    conditions: Conditions, weights: Weights, config: Config, report: Report, denoise: Denoise = denoising.denoise
) -> Performance | Blueprint:
    """The video at config.width x config.height, made as it is asked for.

    In lock-step where that is better: if all windows go through the model at once, a wave would take them in two halves;
    beside other videos, which `denoise` then sees to; and as released, where what windows hear depends on where the speech
    ends.
    """
    windows = plan_windows(len(conditions.speech), config)
    group = group_size(windows.count, config.sampling)
    if windows.count <= group or windows.short_end or denoise is not denoising.denoise:
        return draw_blueprint(conditions, weights, config, report, denoise)

    def of_all(stage, done, _):
        report(stage, done, windows.count)

    return Performance(latents=perform(conditions, [conditions.speech], weights, config, group=group, report=of_all))


def perform(
    conditions: Conditions, speech: Iterable[np.ndarray], weights: Weights, config: Config,
    *, group: int, report: Report,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Latents (t, h, w, C) of one span after the other, of which the last may run over the end of the speech.

    speech: samples as they come, taken only as far as the next `group` windows hear; `conditions.speech` is not read.
    report: how many windows are done, and how many have been heard. ValueError if there is no speech at all.
    """
    sampling, mesh, plan = config.sampling, current(), plan_of(config.sampling)
    assert sampling.indexing == "exact", "as released, what windows hear depends on where the speech ends"
    stride = sampling.window_latents - sampling.overlap
    wave = Wave(length=sampling.window_latents, stride=stride, group=group, levels=sampling.steps)
    ramp = overlap_ramp(sampling.overlap, sampling.fusion)
    shared = share(conditions, [{0: conditions.portrait}], weights, config)
    shared = jax.device_put(fill_banks(shared, group), replicated(mesh))
    steps = plan_steps(sampling)
    levels: list[Level] = []
    none = [_no_residuals(step.reuse.kept, wave.reach, config) for step in steps]
    waiting = jax.device_put(none, replicated(mesh))
    for front, told, count in _rounds(_listen(conditions, speech, weights, config, wave), wave):
        block = begin(jax.device_put(_noise(conditions.seed, front, wave, config), batch_sharding(mesh)), plan)
        levels = levels or [jax.device_put(begin_level(block, wave), replicated(mesh)) for _ in plan.moves]
        residuals: Residuals = {}
        for i, (move, branches, reuse) in enumerate(steps):
            first = wave.first(front, i)
            levels[i], block, waiting[i], residuals = _pass(
                weights.dit, levels[i], block, waiting[i], residuals, move, wave.weights(first, count, ramp),
                jax.device_put(_rows(told, front, first, count, wave), batch_sharding(mesh)), shared,
                config=config.dit, branches=branches, wave=wave, reuse=reuse,
            )  # fmt: skip
        latents, first = np.asarray(block.x), wave.first(front, wave.levels)
        done = range(max(first, 0), min(first + group, count))
        report("performing", max(done.stop, 0), count)
        if done:  # the first window whole, then what each next one adds
            yield np.concatenate([latents[k - first, sampling.overlap if k else 0 :] for k in done])


def _listen(
    conditions: Conditions, speech: Iterable[np.ndarray], weights: Weights, config: Config, wave: Wave
) -> Iterator[tuple[Told, int]]:
    """What the next `group` windows are told, as soon as it has been said, and how many windows there are up to them.

    The last ones hear silence past the end; some of them may not be needed any more.
    """
    front, origin, waiting = 0, 0, np.zeros(0, np.float32)  # origin: the sample that `waiting` begins with

    def next_windows():
        starts = (front + np.arange(wave.group)) * wave.stride
        return starts, spans_of_frames(4 * starts, config.fps, config.sampling)

    for samples in speech:
        waiting = np.concatenate([waiting, samples]) if len(waiting) else samples  # a whole recording is not copied
        while origin + len(waiting) >= (heard := next_windows())[1][-1, 1]:
            starts, spans = heard
            yield tell(conditions, starts, waiting, spans - origin, weights, config), front + wave.group
            front += wave.group
            over = min(max(next_windows()[1][0, 0] - config.memory_samples - origin, 0), len(waiting))
            waiting, origin = waiting[over:], origin + over
    if not origin + len(waiting):
        raise ValueError("the speech is empty: not a single sample of it came")
    _, total = plan_latents(origin + len(waiting), config.fps, config.sampling)
    count = Windows(total, wave.length, wave.stride, slots=1).count
    while front < count:
        starts, spans = next_windows()
        yield tell(conditions, starts, waiting, spans - origin, weights, config), count
        front += wave.group


def _rounds(arrivals: Iterable[tuple[Told, int]], wave: Wave) -> Iterator[tuple[int, Told, int]]:
    """The front of each round, what all windows on their way are told, and how many windows there are; then, when
    nothing more comes, rounds until the last window is done."""
    front, band, told, count = 0, None, None, 0
    for arrival in itertools.chain(arrivals, itertools.repeat(None)):
        if arrival is not None:
            told, count = arrival
        elif wave.first(front, wave.levels) >= count:
            return
        band = _move_up(band, told, wave)
        yield front, band, count
        front += wave.group


def _move_up(band: Told | None, told: Told, wave: Wave) -> Told:
    """The band of a round, from the last level's first window to level 0's last, after the band of the round before."""
    if band is None:  # of windows before the first, which weigh nothing
        behind = (wave.levels - 1) * wave.reach
        band = jax.tree.map(lambda leaf: np.repeat(leaf[:1], behind + wave.group, axis=0), told)
    return jax.tree.map(lambda old, new: np.concatenate([old[wave.group :], new]), band, told)


def _rows(band: Told, front: int, first: int, count: int, wave: Wave) -> Told | None:
    """What the windows from `first` on are told; None where not one of them is in the video."""
    if first + wave.group <= 0 or first >= count:
        return None
    start = first - wave.first(front, wave.levels - 1)
    return jax.tree.map(lambda leaf: leaf[start : start + wave.group], band)


def _noise(seed: int, front: int, wave: Wave, config: Config) -> jax.Array:
    starts = (front + np.arange(wave.group)) * wave.stride
    return noise_of_frames(seed, starts[:, None] + np.arange(wave.length), config)


def _no_residuals(names: tuple[str, ...], count: int, config: Config) -> dict[str, np.ndarray]:
    """Of windows before the first, by the names of branches: (count, S, D)."""
    size = config.sampling.window_latents, config.height // config.vae.side, config.width // config.vae.side
    tokens = np.prod([n // p for n, p in zip(size, config.dit.patch, strict=True)])
    return {name: np.zeros((count, tokens, config.dit.width), jnp.dtype(config.dit.dtype)) for name in names}


@program(static_argnames=("config", "branches", "wave", "reuse"), donate_argnames=("level", "block"))
def _pass(
    params, level: Level, block: History, waiting: Residuals, residuals: Residuals, move: Move, weights,
    told: Told | None, shared: Shared,
    *, config: DiTConfig, branches: tuple[Branch, ...], wave: Wave, reuse: Reuse,
) -> tuple[Level, History, Residuals, Residuals]:  # fmt: skip
    """A round at one noise level; the model is called unless there is nobody to tell anything.

    waiting, residuals: what the blocks added to the windows that wait at this level and to those of the block.
    """
    block = spread(block)
    if told is None:
        velocity, added = jnp.zeros_like(block.x), {}
        residuals = {name: jnp.zeros((wave.group, *leaf.shape[1:]), leaf.dtype) for name, leaf in waiting.items()}
    else:
        reused = {name: residuals[name] for name in reuse.reused}
        velocity, added = guided_velocity(params, move, shared, config, branches, block.x, told, reused, reuse.kept)
    level, block = pass_level(level, block, velocity, weights, move, wave)
    waiting, going = move_on(waiting, {name: (residuals | added)[name] for name in reuse.kept}, wave)
    level, waiting = jax.tree.map(lambda leaf: constrain(leaf, *(None,) * leaf.ndim), (level, waiting))
    return level, spread(block), waiting, jax.tree.map(lambda leaf: constrain(leaf, "batch", "tokens", None), going)
