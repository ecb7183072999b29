"""Linear layers, norms and the timestep embedding: the float32 islands and the LoRA branch are written here once.

Products accumulate in float32 whatever they are computed in; statistics of norms are float32.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.nn.quantised import quantised_matmul
from kavatar_jax.parallel import mesh
from kavatar_jax.parallel.sharding import at_hand, gathered


class Linear(nn.Module):
    """y = x W + b over the last axis, W (in, out). A `lora` collection holding down, up and scale adds its branch.

    quantised: a form of nn/quantised for the product by W, or "" for none
    """

    features: int
    dtype: str
    param_dtype: str
    use_bias: bool = True
    init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    quantised: str = ""

    @nn.compact
    def __call__(self, x):
        kernel = at_hand(self.param("kernel", self.init, (x.shape[-1], self.features), self.param_dtype))
        y = quantised_matmul(x, kernel, self.quantised) if self.quantised else matmul(x, kernel, self.dtype)
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


def matmul(x, kernel, dtype) -> Any:
    """x (..., in) by kernel (in, out) in `dtype`, accumulated and returned in float32; gradients likewise."""
    return _product(x, kernel, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, kernel, dtype):
    return _dot(x.astype(dtype), gathered(kernel.astype(dtype)), x.ndim - 1, 0)


def _product_forward(x, kernel, dtype):
    return _product(x, kernel, dtype), (x, kernel)


def _product_backward(dtype, kept, dy):
    """The gradients that JAX derives multiply dy in float32, at a fraction of the speed of a lower precision."""
    x, kernel = kept
    narrow, dy = x.astype(dtype), dy.astype(dtype)
    dx = _dot(dy, gathered(kernel.astype(dtype)), dy.ndim - 1, 1)
    if dtype.itemsize == 4 or mesh.platform() != "cpu":
        rows = tuple(range(x.ndim - 1))
        dkernel = jax.lax.dot_general(narrow, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    elif kernel.shape[0] <= kernel.shape[1]:
        dkernel = _sum_of_outer(narrow, dy)
    else:
        dkernel = jax.lax.optimization_barrier(_sum_of_outer(dy, narrow)).T  # or XLA turns it into a product it lacks
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


def _sum_of_outer(a, b):
    """(..., m), (..., n) -> (m, n) on a CPU, where XLA takes a left operand that is not transposed at several times the
    speed; so it is transposed by a product with the identity, which it does not move elsewhere.
    """
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    upright = _dot(jnp.eye(a.shape[1], dtype=a.dtype), a, 1, 1).astype(a.dtype)
    return _dot(upright, b, 1, 0)


def _dot(a, b, axis_a: int, axis_b: int):
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


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
