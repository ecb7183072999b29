"""Rotary position embedding over (time, height, width), as in Wan: adjacent pairs, float64 tables, window-local."""

import jax.numpy as jnp
import numpy as np


def axis_sizes(head: int) -> tuple[int, int, int]:
    """How many of a head's channels turn with time, height and width: 44, 42, 42 of 128."""
    side = 2 * (head // 6)
    return head - 2 * side, side, side


def rope_table(frames: int, height: int, width: int, *, head: int) -> np.ndarray:
    """Angles of every token of a grid, frame-major: (frames * height * width, head / 2) float64."""
    grids = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.concatenate(
        [axis_angles(g.reshape(-1), size) for g, size in zip(grids, axis_sizes(head), strict=True)], -1
    )


def axis_angles(positions: np.ndarray, size: int) -> np.ndarray:
    """position * 10000^(-2k/size): (n,) -> (n, size / 2) float64."""
    return positions[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)


def rotate(x_BSNK, cos_SK, sin_SK):
    """Turn adjacent channel pairs (2k, 2k+1) by the angles whose cosine and sine are given, (S, K/2) or (B, S, K/2)."""
    x = x_BSNK.astype(jnp.float32).reshape(*x_BSNK.shape[:-1], -1, 2)
    cos, sin = (jnp.asarray(table, jnp.float32)[..., :, None, :] for table in (cos_SK, sin_SK))
    even, odd = x[..., 0], x[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BSNK.shape).astype(x_BSNK.dtype)
