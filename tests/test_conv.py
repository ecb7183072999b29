from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kavatar_jax.nn import conv
from kavatar_jax.parallel import mesh

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def by_hand(x_BFHWC, kernel):
    """The definition, one product per tap: x has two frames more than the result."""
    x = np.pad(np.asarray(x_BFHWC, np.float64), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    B, F, H, W, _ = x.shape
    y = np.zeros((B, F - 2, H - 2, W - 2, kernel.shape[-1]))
    for t, i, j in np.ndindex(3, 3, 3):
        y += x[:, t : F - 2 + t, i : H - 2 + i, j : W - 2 + j] @ np.asarray(kernel[t, i, j], np.float64)
    return y


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_conv_video_is_its_definition_in_every_form(monkeypatch, platform):
    monkeypatch.setattr(mesh, "platform", lambda: platform)
    x, kernel = draw(2, 5, 6, 7, 4), draw(3, 3, 3, 4, 5)
    np.testing.assert_allclose(conv.conv_video(x, kernel, "float32"), by_hand(x, kernel), atol=2e-5)


def test_products_of_bfloat16_accumulate_in_float32():
    x, kernel = draw(1, 3, 4, 4, 64), draw(3, 3, 3, 64, 8)
    rounded = [np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, kernel)]
    np.testing.assert_allclose(conv.conv_video(x, kernel, "bfloat16"), by_hand(*rounded), atol=1e-4)


@pytest.mark.parametrize("stride, padding", [(1, (1, 1)), (2, (0, 1))])
@pytest.mark.parametrize("height, width", [(8, 6), (9, 7), (5, 10)])
def test_gradients_on_cpu_are_those_of_jax(stride, padding, height, width):
    x, kernel = draw(2, 3, height, width, 5), draw(3, 3, 5, 4)

    def plain(x, kernel):
        x, letters = x.reshape(-1, *x.shape[2:]), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), (padding, padding), dimension_numbers=letters)

    ours, back = jax.vjp(partial(conv.conv_frames, dtype="float32", stride=stride, padding=padding), x, kernel)
    theirs, back_plain = jax.vjp(plain, x, kernel)
    dy = draw(*theirs.shape)
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=1e-5)
    for mine, expected in zip(back(dy.reshape(ours.shape)), back_plain(dy), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-4)


@pytest.mark.parametrize("cuts", [(1,), (3,), (1, 2), (4, 5), (1, 2, 3, 4, 5)])
def test_a_causal_convolution_may_be_cut_anywhere(cuts):
    x = draw(2, 6, 4, 5, 3)
    layer = conv.CausalConv(4, "float32", "float32")
    params = {"params": {"kernel": draw(3, 3, 3, 3, 4) / 9, "bias": draw(4)}}
    whole, last = layer.apply(params, x, None)
    history, pieces = None, []
    for start, end in zip((0, *cuts), (*cuts, 6), strict=True):
        y, history = layer.apply(params, x[:, start:end], history)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-5)
    np.testing.assert_array_equal(history, last)
    np.testing.assert_array_equal(last, x[:, -2:])


def test_causal_convolution_sees_no_later_frame():
    x = draw(1, 5, 4, 4, 3)
    layer = conv.CausalConv(2, "float32", "float32")
    params = {"params": {"kernel": draw(3, 3, 3, 3, 2), "bias": draw(2)}}
    moved = layer.apply(params, x.at[:, 3].add(1.0), None)[0] - layer.apply(params, x, None)[0]
    assert (np.abs(moved).max(axis=(0, 2, 3, 4)) > 0).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("stride, frames", [(1, 3), (1, 6), (2, 3), (2, 5), (2, 9)])
def test_time_convolution_is_its_definition(stride, frames):
    x = draw(1, frames, 2, 3, 4)
    layer = conv.TimeConv(5, "float32", "float32", stride=stride)
    kernel = draw(3, 4, 5)
    params = {"params": {"kernel": kernel, "bias": jnp.zeros(5)}}
    starts = range(0, frames - 2, stride)
    expected = np.stack([sum(np.asarray(x[:, s + t]) @ kernel[t] for t in range(3)) for s in starts], axis=1)
    np.testing.assert_allclose(np.asarray(layer.apply(params, x)), expected, atol=1e-5)
