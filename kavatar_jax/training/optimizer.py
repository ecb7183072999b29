"""AdamW or Muon with warm-up and a clipped gradient norm, as an optax transformation."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kavatar_jax.training.config import OptimizerConfig

ADAM_RMS = 0.2  # size of Muon's updates, so that it takes AdamW's learning rates (Liu et al., arXiv 2502.16982)
MOST = 10  # times the limit that a spike can raise it to


class ClipState(NamedTuple):
    """count: steps done."""

    count: jax.Array


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    def decayed(params):
        def matches(path, _):
            name = "/".join(str(key.key) for key in path[1:])
            return any(re.fullmatch(pattern, name) for pattern in config.decayed)

        return jax.tree_util.tree_map_with_path(matches, params)

    rate = learning_rate(config, steps)
    if config.kind == "muon":
        rule = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            weight_decay_mask=decayed,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=ADAM_RMS,
        )
    else:
        rule = optax.adamw(
            rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed
        )
    return optax.chain(clip_gradients(config), rule)


def matrices(params):
    """Which parameters are linear maps, for Muon: kernels, whose last axis is the output and all before it the input,
    but for the layers of a stack, each a map of its own. None for the rest, which Adam takes care of."""

    def dimensions(path, leaf):
        names = [key.key for key in path]
        if names[-1] not in ("kernel", "down", "up") or leaf.ndim < 2:
            return None
        first = 1 if "blocks" in names else 0
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine that ends with the run."""
    peak = config.learning_rate
    if config.schedule == "constant":
        later = optax.constant_schedule(peak)
    else:
        later = optax.cosine_decay_schedule(peak, max(1, steps - config.warmup), config.final)
    if not config.warmup:
        return later
    return optax.join_schedules([optax.linear_schedule(0.0, peak, config.warmup), later], [config.warmup])


def clip_gradients(config: OptimizerConfig) -> optax.GradientTransformation:
    """Scale gradients down to `norm_limit`."""

    def init(params):
        return ClipState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        norm = optax.tree.norm(updates)
        limit = norm_limit(norm, state.count, config)
        scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-16))
        return jax.tree.map(lambda g: g * scale, updates), ClipState(state.count + 1)

    return optax.GradientTransformation(init, update)


def norm_limit(norm, step, config: OptimizerConfig):
    """The greatest norm allowed at a step: falling from clip_start * clip, and after that lowered by a spike's size.

    StableAvatar, train_1B_square.py: a norm more than `spike` times the limit is met with limit / min(times, 10).
    """
    progress = jnp.clip(step / config.clip_settle, 0, 1) if config.clip_settle else 1.0
    limit = config.clip * (config.clip_start + (1 - config.clip_start) * progress)
    if not config.spike:
        return jnp.asarray(limit, jnp.float32)
    times = norm / limit
    return jnp.where((times > config.spike) & (step > config.clip_settle), limit / jnp.minimum(times, MOST), limit)
