"""Linear layers, norms and the timestep embedding: the float32 islands and the LoRA branch are written here once.

Products accumulate in float32 whatever they are computed in; statistics of norms are float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Linear(nn.Module):
    """y = x W + b over the last axis, W (in, out). A `lora` collection holding down, up and scale adds its branch."""

    features: int
    dtype: str
    param_dtype: str
    use_bias: bool = True
    init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.init, (x.shape[-1], self.features), self.param_dtype)
        y = matmul(x, kernel, self.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(jnp.float32)
        if self.has_variable("lora", "down"):
            down, up, scale = (self.get_variable("lora", name) for name in ("down", "up", "scale"))
            y = y + matmul(matmul(x, down, self.dtype).astype(self.dtype), up, self.dtype) * scale
        return y.astype(self.dtype)


class LayerNorm(nn.Module):
    """Affine layer norm over the last axis; returns `dtype`."""

    eps: float
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return (layer_norm(x, self.eps) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), rounded to `dtype`, then scaled: the order of Wan and T5."""

    eps: float
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x.astype(self.dtype) * scale.astype(self.dtype)


def matmul(x, kernel, dtype):
    """x (..., in) by kernel (in, out) in `dtype`, accumulated and returned in float32."""
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def layer_norm(x, eps: float):
    """Layer norm without parameters over the last axis, float32 in and out."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def gelu_tanh(x):
    return _gelu(x, approximate=True)


def gelu_erf(x):
    return _gelu(x, approximate=False)


def timestep_embedding(t_B, width: int):
    """Sinusoids of timesteps in [0, 1000], cosines first: (B,) -> (B, width) float32.

    float32 angles would cost most of the parity budget at large t, so each product t * frequency is formed from an
    8-bit-split t and reduced by whole turns before the trigonometric functions see it.
    """
    half = width // 2
    turns = 10000.0 ** (-np.arange(half) / half) / (2 * np.pi)
    t_B1 = t_B.astype(jnp.float32)[:, None]
    whole = jnp.floor(t_B1)
    turn_fraction = _times_mod_one(whole, turns) + _times_mod_one(t_B1 - whole, turns)
    angles = 2 * np.pi * (turn_fraction - jnp.round(turn_fraction))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _gelu(x, *, approximate: bool):
    """In float32, rounded once: cheaper on a CPU than rounding after every operation, and what the references do."""
    return nn.gelu(x.astype(jnp.float32), approximate=approximate).astype(x.dtype)


def _times_mod_one(a, b):
    """a * b mod 1 in float32, for b (float64, below 1) split into three parts of 12 bits so that products are exact."""
    total, rest = jnp.zeros(()), np.asarray(b, np.float64)
    for bits in (12, 24, 36):
        part = np.round(rest * 2.0**bits) / 2.0**bits
        rest = rest - part
        product = a * part.astype(np.float32)
        total = total + (product - jnp.round(product))
    return total - jnp.round(total)
