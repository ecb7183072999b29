"""Attention inside each latent frame: between its tokens and what it hears, for all T frames of a clip at once.

A clip's tokens are frame after frame in one row, S of them, P of each frame. Where that row lies over the mesh's context no
token is sent: a device's own lie in a few frames, of which the first and the last need not be its own wholly. What frames
hear is little, and every device has all of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kavatar_jax.nn.attention import attend, attend_in_chunks
from kavatar_jax.parallel.sharding import mesh_axis, place_of

TOKENS = ("batch", "tokens", "heads", None)
HEARD = ("batch", None, None, "heads", None)


def tokens_to_heard(q_BSNK, k_BTANK, v_BTANK, keys_BTA):
    """Each token attends to the keys of its frame. keys_BTA: those that exist."""
    arrays, logical = (q_BSNK, k_BTANK, v_BTANK, keys_BTA), (TOKENS, HEARD, HEARD, HEARD[:3])
    return _spread(_hear, _hear_in_part, arrays, logical, out=TOKENS)


def heard_to_tokens(q_BTANK, k_BSNK, v_BSNK):
    """What each frame hears attends to the frame's tokens."""
    return _spread(_look, _look_in_part, (q_BTANK, k_BSNK, v_BSNK), (HEARD, TOKENS, TOKENS), out=HEARD)


def _spread(alone, in_part, arrays: tuple, logical: tuple, *, out):
    """alone(*arrays), or where tokens lie over context in_part(*arrays) by hand on every device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return alone(*arrays)
    specs = tuple(place_of(array.shape, names, mesh).spec for array, names in zip(arrays, logical, strict=True))
    tokens, result = specs[logical.index(TOKENS)], specs[logical.index(out)]
    if tokens[1] is None or mesh.shape[mesh_axis("tokens")] == 1:
        return alone(*arrays)
    return jax.shard_map(in_part, in_specs=specs, out_specs=result, check_vma=False)(*arrays)


class _Part(NamedTuple):
    """A device's own tokens. size: how many; frame: tokens of a frame; touched: frames that they lie in, the first of them
    number `start`, in which `offset` tokens come before them."""

    size: int
    frame: int
    touched: int
    start: jax.Array
    offset: jax.Array

    def lay(self, x_BSNK):
        """(B, touched * frame, N, K): own tokens at their place, zeros around."""
        B, _, N, K = x_BSNK.shape
        laid = jnp.zeros((B, self.touched * self.frame, N, K), x_BSNK.dtype)
        return jax.lax.dynamic_update_slice_in_dim(laid, x_BSNK, self.offset, axis=1)

    def pick(self, x_BSNK):
        """The inverse of lay."""
        return jax.lax.dynamic_slice_in_dim(x_BSNK, self.offset, self.size, axis=1)

    def heard(self, x_BT):
        """What belongs to the frames that are touched."""
        return jax.lax.dynamic_slice_in_dim(x_BT, self.start, self.touched, axis=1)


def _own_part(size: int, frames: int) -> _Part:
    axis = mesh_axis("tokens")
    frame = size * jax.lax.axis_size(axis) // frames
    touched = min(frames, -(-(size - 1) // frame) + 1) if size % frame else size // frame
    first = jax.lax.axis_index(axis) * size
    start = jnp.minimum(first // frame, frames - touched)
    return _Part(size, frame, touched, start, first - start * frame)


def _hear(q_BSNK, k_BTANK, v_BTANK, keys_BTA):
    frames = keys_BTA.shape[0] * keys_BTA.shape[1]
    q, k, v, keys = (x.reshape(frames, -1, *x.shape[axis:]) for x, axis in
                     ((q_BSNK, 2), (k_BTANK, 3), (v_BTANK, 3), (keys_BTA, 3)))  # fmt: skip
    return attend_in_chunks(q, k, v, keys_BL=keys, scale=q.shape[-1] ** -0.5).reshape(q_BSNK.shape)


def _hear_in_part(q_BSNK, *heard):
    frames = heard[0].shape[1]
    if frames == 1:
        return _hear(q_BSNK, *heard)
    part = _own_part(q_BSNK.shape[1], frames)
    return part.pick(_hear(part.lay(q_BSNK), *map(part.heard, heard)))


def _look(q_BTANK, k_BSNK, v_BSNK):
    B, T, A, N, K = q_BTANK.shape
    q, k, v = (x.reshape(B * T, -1, N, K) for x in (q_BTANK, k_BSNK, v_BSNK))
    return attend(q, k, v).reshape(q_BTANK.shape)


def _look_in_part(q_BTANK, k_BSNK, v_BSNK):
    """Softmax over a frame's tokens wherever they lie: devices agree on the largest logit and add up their sums."""
    B, T, A, N, K = q_BTANK.shape
    axis, part = mesh_axis("tokens"), _own_part(k_BSNK.shape[1], T)
    q, k, v = part.heard(q_BTANK), *(part.lay(x).reshape(B, part.touched, -1, N, K) for x in (k_BSNK, v_BSNK))
    place = jnp.arange(part.touched * part.frame).reshape(part.touched, 1, 1, part.frame)
    own = (place >= part.offset) & (place < part.offset + part.size)

    logits = jnp.einsum("btank,btpnk->btnap", q, k, preferred_element_type=jnp.float32) * K**-0.5
    least = jnp.finfo(jnp.float32).min
    most = jax.lax.stop_gradient(jnp.where(own, logits, least).max(axis=-1, keepdims=True))
    most = jax.lax.pmax(_among(most, jnp.full((B, T, N, A, 1), least), part), axis)
    weights = jnp.where(own, jnp.exp(logits - part.heard(most)), 0)
    sums = jnp.einsum("btnap,btpnk->btnak", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    sums = jnp.concatenate([sums, weights.sum(axis=-1, keepdims=True)], axis=-1)
    sums = jax.lax.psum(_among(sums, jnp.zeros((B, T, N, A, K + 1)), part), axis)
    return (sums[..., :K] / sums[..., K:]).swapaxes(2, 3).astype(q_BTANK.dtype)


def _among(x_BT, frames_BT, part: _Part):
    """All frames, with those that are touched replaced."""
    return jax.lax.dynamic_update_slice_in_dim(frames_BT, x_BT, part.start, axis=1)
