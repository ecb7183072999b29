"""Products of 8-bit numbers, for inference: every token and every output channel is scaled to the range by itself.

Scales are found anew for each call, so that nothing needs to be calibrated or converted. Vector-wise scales: LLM.int8,
arXiv 2208.07339, section 2.1; the 8-bit float with four bits of exponent: arXiv 2209.05433.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kavatar_jax.parallel.sharding import gathered


class Form(NamedTuple):
    """dtype: of the operands; largest: number of it that the largest magnitude becomes; sum: dtype of sums of products."""

    dtype: jnp.dtype
    largest: float
    sum: jnp.dtype


FORMS = {
    "int8": Form(jnp.dtype(jnp.int8), 127.0, jnp.dtype(jnp.int32)),
    "fp8": Form(jnp.dtype(jnp.float8_e4m3fn), 448.0, jnp.dtype(jnp.float32)),
}


def quantised_matmul(x, kernel, form: str):
    """x (..., in) by kernel (in, out) -> float32, from 8-bit operands; no gradients."""
    x, x_scale = quantise(x, form, axis=-1)
    kernel, kernel_scale = quantise(kernel, form, axis=0)
    contracted = (((x.ndim - 1,), (0,)), ((), ()))
    total = jax.lax.dot_general(x, gathered(kernel), contracted, preferred_element_type=FORMS[form].sum)
    return total.astype(jnp.float32) * x_scale * kernel_scale[0]


def quantise(x, form: str, *, axis: int):
    """-> 8-bit numbers, and the float32 scale of each vector along `axis`: numbers times scale are about x."""
    dtype, largest, _ = FORMS[form]
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / largest
    scaled = x / jnp.where(scale > 0, scale, 1)
    return (jnp.round(scaled) if form == "int8" else scaled).astype(dtype), scale
