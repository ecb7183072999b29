"""One optimiser step: state and batch in, state and metrics out, compiled once for every bucket.

A step whose loss or gradient is not finite changes nothing and marks the state; no later step changes it either, so what
the device holds when the host hears of it is the last good state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kavatar_jax.parallel.mesh import AXES
from kavatar_jax.parallel.sharding import batch_sharding, replicated
from kavatar_jax.training.config import TrainConfig
from kavatar_jax.training.optimizer import learning_rate, make_optimizer
from kavatar_jax.training.state import TrainState
from kavatar_jax.types import Params

# (trained, frozen, batch, draws, clip_level) -> named values per clip, each (B,); "loss" is what is minimised
Losses = Callable[[Params, Params, Any, Any, bool], dict[str, jax.Array]]


class Metrics(NamedTuple):
    """Of one step. means: of what the losses name; bands: (2, n) summed loss and number of clips by noise level

    stop: whether any process was asked to stop
    """

    healthy: jax.Array
    means: dict[str, jax.Array]
    bands: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    stop: jax.Array


def make_step(losses: Losses, draw: Callable, config: TrainConfig, shardings: TrainState, mesh):
    """step(state, frozen, batch, votes, clip_level) -> state, metrics; the state that goes in is given up.

    draw: (key, batch) -> everything random, each leaf with the clips first. votes: from `cast_votes`
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    rate = learning_rate(config.optimizer, config.steps)

    def step(state: TrainState, frozen: Params, batch, votes, clip_level: bool):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        parts = _cut((batch, draw(key, batch)), config.optimizer.accumulate)

        def loss(trained, part):
            clips, drawn = part
            values = losses(trained, frozen, clips, drawn, clip_level)
            return values["loss"].mean(), values

        def accumulate(total, part):
            gradients, values = jax.grad(loss, has_aux=True)(state.trained, part)
            total = jax.tree.map(jnp.add, total, gradients)
            return jax.lax.with_sharding_constraint(total, shardings.trained), values

        gradients, values = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.trained), parts)
        gradients = jax.tree.map(lambda g: g / config.optimizer.accumulate, gradients)
        norm = optax.tree.norm(gradients)
        updates, slots = optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        ema = state.ema and jax.tree.map(lambda e, x: e + (1 - config.optimizer.ema) * (x - e), state.ema, trained)
        healthy = state.healthy & jnp.isfinite(values["loss"].mean()) & jnp.isfinite(norm)
        new = TrainState(state.step + 1, healthy, trained, slots, ema)
        new = jax.tree.map(lambda new, old: jnp.where(healthy, new, old), new, state)._replace(healthy=healthy)
        means = {name: value.mean() for name, value in values.items()}
        bands = _bands(values, config.log.bands)
        return new, Metrics(healthy, means, bands, norm, rate(state.step), votes.max())

    # one program per bucket, and another where audio over the whole clip is drawn too
    kinds = 1 if config.task != "dit" or config.objective.clip_level in (0, 1) else 2
    whole, batches = replicated(mesh), batch_sharding(mesh)
    return jax.jit(
        chex.assert_max_traces(step, n=kinds * len(config.data.buckets)),
        static_argnums=4,
        in_shardings=(shardings, None, batches, None),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )


def cast_votes(stop: bool, mesh) -> jax.Array:
    """One vote per device, so that every process learns, with the step's metrics, whether any was asked to stop."""
    sharding = jax.NamedSharding(mesh, jax.P(AXES))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.full(mesh.size, stop)[index])


def draw_clip_level(config: TrainConfig, number: int) -> bool:
    """Whether audio attention spans the clip in this step; the same on every process."""
    return config.task == "dit" and bool(
        np.random.default_rng([config.seed, number]).random() < config.objective.clip_level
    )


def _cut(tree, parts: int):
    """(B, ...) -> (parts, B / parts, ...), so that every part takes the same share from each slot of the mesh."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), tree)


def _bands(values: dict[str, jax.Array], count: int):
    """Sums and counts of the loss over equal bands of the noise level; where there is none, all in the first."""
    sigma, loss = values.get("sigma", jnp.zeros_like(values["loss"])).reshape(-1), values["loss"].reshape(-1)
    band = jnp.minimum((sigma * count).astype(jnp.int32), count - 1)
    return jnp.zeros((2, count)).at[:, band].add(jnp.stack([loss, jnp.ones_like(loss)]))
