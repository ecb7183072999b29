"""What lies before and after the blocks of the diffusion transformer: latents, time, words and portrait in, latents out.

Source: Wan-Video/Wan2.1, wan/modules/model.py.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from kavatar_jax.config import DiTConfig
from kavatar_jax.nn.layers import LayerNorm, Linear, gelu_erf, gelu_tanh, layer_norm, matmul, timestep_embedding


class Patchify(nn.Module):
    """(B, T, H, W, C) latents and condition -> (B, S, D) tokens, frame-major; a strided convolution as a product."""

    config: DiTConfig

    @nn.compact
    def __call__(self, latents, condition):
        c = self.config
        x = latents if condition is None else jnp.concatenate([latents, condition.astype(latents.dtype)], axis=-1)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*c.patch, c.in_channels, c.width), c.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (c.width,), c.param_dtype)
        (t, h, w), (B, T, H, W, C) = c.patch, x.shape
        x = x.reshape(B, T // t, t, H // h, h, W // w, w, C).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        x = x.reshape(B, (T // t) * (H // h) * (W // w), -1)
        return (matmul(x, kernel.reshape(-1, c.width), c.dtype) + bias).astype(c.dtype)


class TimeEmbedding(nn.Module):
    """(B,) timesteps -> (B, D) embedding and (B, 6, D) modulation, all float32."""

    config: DiTConfig

    @nn.compact
    def __call__(self, timestep_B):
        c = self.config
        x = timestep_embedding(timestep_B, c.time_width)
        x = nn.silu(Linear(c.width, "float32", c.param_dtype, name="in")(x))
        time_BD = Linear(c.width, "float32", c.param_dtype, name="out")(x)
        modulation = Linear(6 * c.width, "float32", c.param_dtype, name="modulation")(nn.silu(time_BD))
        return time_BD, modulation.reshape(-1, 6, c.width)


class TextEmbedding(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, text_BLD):
        c = self.config
        x = gelu_tanh(Linear(c.width, c.dtype, c.param_dtype, name="in")(text_BLD))
        return Linear(c.width, c.dtype, c.param_dtype, name="out")(x)


class ImageEmbedding(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, image_BLD):
        c = self.config
        x = image_BLD
        if c.image_positions:
            shape = (c.image_positions, c.image_width)
            x = x + self.param("positions", nn.initializers.normal(0.02), shape, c.param_dtype)
        x = LayerNorm(1e-5, c.dtype, c.param_dtype, name="norm_in")(x)
        x = gelu_erf(Linear(c.image_width, c.dtype, c.param_dtype, name="in")(x))
        x = Linear(c.width, c.dtype, c.param_dtype, name="out")(x)
        return LayerNorm(1e-5, c.dtype, c.param_dtype, name="norm_out")(x)


class Head(nn.Module):
    """Tokens -> velocity, or clean latents, (B, T, H, W, out_channels) float32."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BSD, time_BD, grid):
        c = self.config
        table_2D = self.param("modulation", nn.initializers.normal(c.width**-0.5), (2, c.width), c.param_dtype)
        shift, scale = jnp.split(table_2D.astype(jnp.float32) + time_BD[:, None], 2, axis=1)
        x = (layer_norm(x_BSD, 1e-6) * (1 + scale) + shift).astype(c.dtype)
        x = Linear(int(np.prod(c.patch)) * c.out_channels, c.dtype, c.param_dtype, name="out")(x).astype(jnp.float32)
        (T, H, W), (t, h, w) = grid, c.patch
        x = x.reshape(-1, T, H, W, t, h, w, c.out_channels).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(-1, T * t, H * h, W * w, c.out_channels)


class Skip(nn.Module):
    """Tokens and time -> gains of what is noisy, (B, T, H, W, out_channels) float32: each channel's, zero at first.

    The noise level decides for the whole clip, the token for its own place: what stands still needs nothing of the noise.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BSD, time_BD, grid):
        c, start = self.config, nn.initializers.zeros
        gains = Linear(c.out_channels, "float32", c.param_dtype, init=start, name="time")(time_BD)[:, None]
        x = layer_norm(x_BSD, 1e-6).astype(c.dtype)
        gains = gains + Linear(c.out_channels, c.dtype, c.param_dtype, init=start, use_bias=False, name="token")(x)
        gains = gains.astype(jnp.float32).reshape(-1, *grid, c.out_channels)
        for axis, size in enumerate(c.patch):
            gains = jnp.repeat(gains, size, axis=1 + axis)
        return gains
