"""Every form of attention gives the numbers of the plain one, forwards and backwards, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kavatar_jax.nn.attention import attend, attend_head_by_head, dense, splash
from kavatar_jax.nn.dense import Blocks, attend_densely, block_of
from kavatar_jax.parallel.mesh import make_mesh


def draw(B, S, L, N, K, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (B, n, N, K), dtype) for key, n in zip(keys, (S, L, L), strict=True))


def plain(q, k, v, *, scale):
    return jnp.einsum("bnql,blnk->bqnk", jax.nn.softmax(jnp.einsum("bqnk,blnk->bnql", q, k) * scale), v)


@functools.partial(jax.jit, static_argnums=0)
def both_ways(form, *arrays):
    """What the form gives, and the gradients of a function of it."""
    return form(*arrays), *jax.grad(lambda *x: jnp.sum(jnp.sin(form(*x))), (0, 1, 2))(*arrays)


def assert_same(one, two):
    for mine, other in zip(one, two, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 33])
def test_head_by_head_equals_the_plain_form(queries):
    arrays = draw(2, queries, 40, 3, 8)
    form = functools.partial(attend_head_by_head, scale=0.5, chunk=32)
    assert_same(both_ways(form, *arrays), both_ways(functools.partial(plain, scale=0.5), *arrays))


@pytest.mark.parametrize(("queries", "keys", "head"), [(200, 137, 64), (130, 256, 128)])
def test_splash_equals_the_plain_form_past_its_padding(queries, keys, head):
    arrays = draw(1, queries, keys, 2, head)
    form = functools.partial(splash, scale=head**-0.5, interpret=True)
    assert_same(both_ways(form, *arrays), both_ways(functools.partial(plain, scale=head**-0.5), *arrays))


@pytest.mark.parametrize(
    ("queries", "keys", "head", "blocks"),
    [(200, 137, 64, (128, 128, 128)), (300, 700, 128, (128, 256, 128)), (130, 256, 128, (1024, 2048, 512))],
)
def test_the_dense_kernel_equals_the_plain_form_to_its_last_key(queries, keys, head, blocks):
    """Also where the last block, or the last chunk of it, has keys that do not exist, and where one key outweighs all."""
    q, k, v = draw(2, queries, keys, 2, head)
    k = k.at[:, keys // 2].mul(4)
    out, lse = attend_densely(q, k, v, Blocks(*blocks), scale=head**-0.5, interpret=True)
    np.testing.assert_allclose(out, plain(q, k, v, scale=head**-0.5), atol=1e-5)
    logits = jnp.einsum("bqnk,blnk->bqnl", q, k) * head**-0.5
    np.testing.assert_allclose(lse, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)


def test_gradients_through_the_dense_kernel_are_those_of_the_plain_form():
    arrays = draw(1, 130, 137, 2, 64)
    form = functools.partial(dense, scale=0.1, interpret=True)
    assert_same(both_ways(form, *arrays), both_ways(functools.partial(plain, scale=0.1), *arrays))


@pytest.mark.parametrize(
    ("tokens", "block", "padded"), [(128, 128, 128), (257, 384, 384), (1560, 896, 1792), (32760, 1024, 32768)]
)
def test_blocks_pad_less_than_a_lane_each(tokens, block, padded):
    assert block_of(tokens, 1024) == block
    assert -(-tokens // block) * block == padded


@pytest.mark.parametrize(
    ("batch", "sizes"), [(4, (2, 2, 2, 1)), (3, (2, 2, 2, 1)), (4, (1, 1, 2, 4)), (3, (1, 1, 8, 1))]
)
def test_eight_devices_give_the_numbers_of_one(batch, sizes):
    """Also where the batch or the 260 queries do not divide by the mesh."""
    arrays = draw(batch, 260, 128, 4, 8)
    alone = both_ways(attend, *arrays)
    with jax.set_mesh(make_mesh(*sizes)):
        assert_same(both_ways(attend, *arrays), alone)
