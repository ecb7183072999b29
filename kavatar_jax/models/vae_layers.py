"""The blocks of Wan's causal video autoencoder (Wan 2.1, arXiv 2503.20314), each called with the frames of one chunk.

A block takes (x, state) and returns (x, state): state is a nested dict of the frames its convolutions look back on, None
before the first chunk. The first chunk may hold one frame or the whole video; every later one continues it exactly.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kavatar_jax.config import VAEConfig
from kavatar_jax.nn.attention import attend
from kavatar_jax.nn.conv import HISTORY, CausalConv, FrameConv, TimeConv, with_history
from kavatar_jax.nn.layers import Linear
from kavatar_jax.parallel.sharding import constrain


def layout(clips: int) -> tuple[str | None, ...]:
    """Where (B, F, H, W, C) lies: one clip's pictures over the whole mesh, cut both ways, so that convolutions exchange what
    lies along the cuts; of several, the clips over the batch axes and their columns where tokens go."""
    return (None, None, "rows", "columns", None) if clips == 1 else ("batch", None, None, "tokens", None)


def spread(x_BFHWC):
    """Pictures inside a program, laid out as above; sides that do not divide lie in parts of unequal size."""
    return constrain(x_BFHWC, *layout(len(x_BFHWC)), padded=len(x_BFHWC) == 1)


def thread(state):
    """-> run, kept. run(layer, x) calls a named layer with its part of the state and keeps what it remembers in `kept`.

    A state may be filled up behind the rows and columns of x.
    """
    kept = {}

    def run(layer, x):
        B, _, H, W, _ = x.shape
        before = None if state is None else jax.tree.map(lambda seen: spread(seen[:B, :, :H, :W]), state[layer.name])
        x, kept[layer.name] = layer(x, before)
        return spread(x)

    return run, kept


class ChannelNorm(nn.Module):
    """Every position's channels scaled to length sqrt(C), then by a learnt scale; float32 out, for the SiLU that follows."""

    param_dtype: str

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        # a length below 1e-12 counts as 1e-12; a vector that short has no direction, so no gradient goes through it
        x = jnp.where(squares > 1e-24, x, jax.lax.stop_gradient(x))
        return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) * (scale.astype(jnp.float32) * x.shape[-1] ** 0.5)


class ResBlock(nn.Module):
    """Twice norm, SiLU, causal convolution; around it the identity, or a linear layer where the width changes."""

    config: VAEConfig
    features: int

    @nn.compact
    def __call__(self, x_BFHWC, state):
        types = {"dtype": self.config.dtype, "param_dtype": self.config.param_dtype}
        run, kept = thread(state)
        skip = x_BFHWC
        if x_BFHWC.shape[-1] != self.features:
            skip = Linear(self.features, **types, name="shortcut")(x_BFHWC)
        x = nn.silu(ChannelNorm(types["param_dtype"], name="norm1")(x_BFHWC))
        x = run(CausalConv(self.features, **types, name="conv1"), x)
        x = nn.silu(ChannelNorm(types["param_dtype"], name="norm2")(x))
        x = run(CausalConv(self.features, **types, name="conv2"), x)
        return x + skip, kept


class Middle(nn.Module):
    """Two residual blocks around attention over the positions of each frame, one head as wide as the channels."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x_BFHWC, state):
        run, kept = thread(state)
        C = x_BFHWC.shape[-1]
        x = run(ResBlock(self.config, C, name="block_0"), x_BFHWC)
        x = FrameAttention(self.config, name="attention")(x)
        x = run(ResBlock(self.config, C, name="block_1"), x)
        return x, kept


class FrameAttention(nn.Module):
    """x + attention within each frame."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x_BFHWC):
        types = {"dtype": self.config.dtype, "param_dtype": self.config.param_dtype}
        B, F, H, W, C = x_BFHWC.shape
        x = ChannelNorm(types["param_dtype"], name="norm")(x_BFHWC)
        qkv = Linear(3 * C, **types, name="qkv")(x)
        q, k, v = (x.reshape(B * F, H * W, 1, C) for x in jnp.split(qkv, 3, axis=-1))
        over = (None, "positions", None) if B == 1 else ("batch", "tokens", None)
        x = attend(q, k, v, layout=over).reshape(B, F, H, W, C)
        return x_BFHWC + Linear(C, **types, init=nn.initializers.zeros, name="project")(x)


class Downsample(nn.Module):
    """Half the height and width; if `temporal`, half the frames too, except the video's first, which stays alone."""

    config: VAEConfig
    temporal: bool

    @nn.compact
    def __call__(self, x_BFHWC, state):
        types = {"dtype": self.config.dtype, "param_dtype": self.config.param_dtype}
        C = x_BFHWC.shape[-1]
        x = FrameConv(C, **types, stride=2, padding=(0, 1), name="conv")(x_BFHWC)
        if not self.temporal:
            return x, None
        last = x[:, -1:]
        if state is None and x.shape[1] == 1:
            return x, last
        halve = TimeConv(C, **types, stride=2, name="time")
        if state is None:
            return jnp.concatenate([x[:, :1], halve(x)], axis=1), last
        return halve(jnp.concatenate([state, x], axis=1)), last


class Upsample(nn.Module):
    """Twice the height and width and half the channels; if `temporal`, twice the frames too, except the video's first.

    That first frame is not part of the history either: the second one sees zeros before it.
    """

    config: VAEConfig
    temporal: bool

    @nn.compact
    def __call__(self, x_BFHWC, state):
        types = {"dtype": self.config.dtype, "param_dtype": self.config.param_dtype}
        C = x_BFHWC.shape[-1]
        x, kept = x_BFHWC, None
        if self.temporal:
            first, rest = (x[:, :1], x[:, 1:]) if state is None else (x[:, :0], x)
            seen = with_history(rest, state)
            kept = seen[:, -HISTORY:]
            if rest.shape[1]:
                even, odd = jnp.split(TimeConv(2 * C, **types, name="time")(seen), 2, axis=-1)
                doubled = jnp.stack([even, odd], axis=2).reshape(x.shape[0], -1, *x.shape[2:])
                x = jnp.concatenate([first, doubled], axis=1)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return FrameConv(C // 2, **types, name="conv")(x), kept
