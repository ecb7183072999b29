"""Convolutions over video (B, F, H, W, C): causal in time with an explicit history, zeros around space.

A causal convolution sees the frames of its call and the two before them, which it hands back for the next call; so a
video may be cut into calls anywhere and the result is the same. Products are in `dtype` and accumulate in float32.
Kernels are (*window, in, out).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from kavatar_jax.nn.layers import matmul
from kavatar_jax.parallel import mesh

HISTORY = 2  # frames a window of three looks back on

kernel_init = nn.initializers.lecun_normal()
bias_init = nn.initializers.zeros


class CausalConv(nn.Module):
    """Window 3x3x3: frame f is made of frames f-2, f-1, f. A history of None stands for black frames, all zero."""

    features: int
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x_BFHWC, history):
        """-> (B, F, H, W, features), and the last two input frames."""
        kernel = self.param("kernel", kernel_init, (3, 3, 3, x_BFHWC.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
        seen = with_history(x_BFHWC.astype(self.dtype), history)
        if history is None and x_BFHWC.shape[1] == 1:
            y = conv_frames(x_BFHWC, kernel[-1], self.dtype)  # a lone first frame meets nothing but zeros before it
        else:
            y = conv_video(seen, kernel, self.dtype)
        return (y + bias.astype(jnp.float32)).astype(self.dtype), seen[:, -HISTORY:]


class FrameConv(nn.Module):
    """Window 3x3 on every frame alone. padding: zeros before and after, the same for height and width."""

    features: int
    dtype: str
    param_dtype: str
    stride: int = 1
    padding: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x_BFHWC):
        kernel = self.param("kernel", kernel_init, (3, 3, x_BFHWC.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
        y = conv_frames(x_BFHWC, kernel, self.dtype, stride=self.stride, padding=self.padding)
        return (y + bias.astype(jnp.float32)).astype(self.dtype)


class TimeConv(nn.Module):
    """Window 3 in time at every position alone, no padding: F frames give (F - 3) // stride + 1."""

    features: int
    dtype: str
    param_dtype: str
    stride: int = 1

    @nn.compact
    def __call__(self, x_BFHWC):
        C, count = x_BFHWC.shape[-1], x_BFHWC.shape[1] - HISTORY
        kernel = self.param("kernel", kernel_init, (3, C, self.features), self.param_dtype)
        bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
        windows = jnp.concatenate([x_BFHWC[:, tap : tap + count : self.stride] for tap in range(3)], axis=-1)
        y = matmul(windows, kernel.reshape(3 * C, self.features), self.dtype)
        return (y + bias.astype(jnp.float32)).astype(self.dtype)


def with_history(x_BFHWC, history):
    """The two frames before, zeros if None, and then the frames themselves."""
    if history is None:
        return jnp.pad(x_BFHWC, ((0, 0), (HISTORY, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([history, x_BFHWC], axis=1)


def conv_video(x_BFHWC, kernel, dtype):
    """3x3x3 over (B, F + 2, H, W, C) -> (B, F, H, W, out) float32 or `dtype`: no padding in time, zeros around space.

    On CPU a sum of three 2D convolutions: XLA has a fast path for 2D there, and one half as fast or worse for 3D.
    """
    if mesh.platform() == "cpu":
        count = x_BFHWC.shape[1] - HISTORY
        return sum(conv_frames(x_BFHWC[:, tap : tap + count], kernel[tap], dtype) for tap in range(3))
    x, kernel = x_BFHWC.astype(dtype), kernel.astype(dtype)
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), ((0, 0), (1, 1), (1, 1)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def conv_frames(x_BFHWC, kernel, dtype, *, stride: int = 1, padding: tuple[int, int] = (1, 1)):
    """3x3 on every frame: (B, F, H, W, C) -> (B, F, H', W', out) float32 or `dtype`.

    Operands are rounded to `dtype`. GPU and TPU accumulate in float32 by themselves, a CPU does where they are widened.
    """
    B, F = x_BFHWC.shape[:2]
    x, kernel = x_BFHWC.reshape(B * F, *x_BFHWC.shape[2:]).astype(dtype), kernel.astype(dtype)
    if mesh.platform() == "cpu":
        y = _conv_on_cpu(x.astype(jnp.float32), kernel.astype(jnp.float32), stride, padding)
    else:
        y = _conv(x, kernel, (padding, padding), stride=stride)
    return y.reshape(B, F, *y.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_on_cpu(x_BHWC, kernel, stride, padding):
    """The gradients that JAX derives swap batch and channels, for which XLA has no fast path inside a scan: they take
    20 times as long as these, whose operands are transposed beforehand.
    """
    return _conv(x_BHWC, kernel, (padding, padding), stride=stride)


def _conv_forward(x_BHWC, kernel, stride, padding):
    return _conv_on_cpu(x_BHWC, kernel, stride, padding), (x_BHWC, kernel)


def _conv_backward(stride, padding, kept, dy_BHWC):
    x_BHWC, kernel = kept
    sizes, window, before = x_BHWC.shape[1:3], kernel.shape[0], padding[0]
    spans = [stride * (size - 1) + 1 for size in dy_BHWC.shape[1:3]]  # of dy with its values `stride` apart

    back = window - 1 - before  # zeros before dy, and after it as many as give x its size
    pads = [(back, size + window - 1 - span - back) for size, span in zip(sizes, spans, strict=True)]
    dx = _conv(dy_BHWC, kernel[::-1, ::-1].swapaxes(2, 3), pads, spread_input=stride)

    x_CHWB, dy_HWBO = x_BHWC.transpose(3, 1, 2, 0), dy_BHWC.transpose(1, 2, 0, 3)
    pads = [(before, window + span - 1 - size - before) for size, span in zip(sizes, spans, strict=True)]
    dkernel_CHWO = _conv(x_CHWB, dy_HWBO, pads, spread_kernel=stride)
    return dx, dkernel_CHWO.transpose(1, 2, 0, 3)


_conv_on_cpu.defvjp(_conv_forward, _conv_backward)


def _conv(x_BHWC, kernel, padding, *, stride: int = 1, spread_input: int = 1, spread_kernel: int = 1):
    return jax.lax.conv_general_dilated(
        x_BHWC,
        kernel,
        (stride, stride),
        padding,
        lhs_dilation=(spread_input, spread_input),
        rhs_dilation=(spread_kernel, spread_kernel),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
