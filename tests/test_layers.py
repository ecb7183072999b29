"""Closed forms of what models are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kavatar_jax.nn.attention import attend, attend_in_chunks
from kavatar_jax.nn.layers import layer_norm, matmul, timestep_embedding
from kavatar_jax.nn.rope import axis_sizes, rope_table, rotate


def test_timestep_embedding_holds_float64_accuracy():
    t = np.array([0.0, 0.4375, 24.4140625, 395.0954, 999.0, 1000.0], np.float32)
    angles = t.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(128) / 128)
    exact = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(jax.jit(timestep_embedding, static_argnums=1)(t, 256), exact, atol=4e-7)


def test_rope_splits_heads_as_wan_does():
    assert axis_sizes(128) == (44, 42, 42)
    table = rope_table(2, 3, 4, head=128)
    assert table.shape == (24, 64)
    token = 1 * 12 + 2 * 4 + 3  # frame 1, row 2, column 3
    np.testing.assert_allclose(table[token, [0, 22, 43]], [1, 2, 3])
    np.testing.assert_allclose(table[token, 1], 10000 ** (-2 / 44))


def test_rotation_keeps_lengths_and_turns_adjacent_pairs():
    x = jnp.asarray([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    angles = np.array([[np.pi / 2, np.pi]])
    turned = rotate(x, np.cos(angles), np.sin(angles)).reshape(4)
    np.testing.assert_allclose(turned, [0, 1, 0, -2], atol=1e-6)


@pytest.mark.parametrize("queries", [5, 64, 130])
def test_chunks_equal_the_whole(queries):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, n, 3, 8)) for key, n in zip(keys[:3], (queries, 40, 40), strict=True))
    bias = jax.random.normal(keys[3], (3, queries, 40))
    real = jnp.arange(40) < jnp.array([[40], [17]])
    logits = jnp.einsum("bqnk,blnk->bnql", q, k) * 0.5 + bias
    weights = jax.nn.softmax(jnp.where(real[:, None, None], logits, -jnp.inf))
    whole = jnp.einsum("bnql,blnk->bqnk", weights, v)
    chunked = attend_in_chunks(q, k, v, keys_BL=real, bias_NSL=bias, scale=0.5, chunk=32)
    np.testing.assert_allclose(chunked, whole, atol=2e-6)


def test_attention_gradient_matches_the_plain_one():
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (1, 70, 2, 8)) for key in keys)

    def plain(q, k, v):
        return jnp.einsum("bnql,blnk->bqnk", jax.nn.softmax(jnp.einsum("bqnk,blnk->bnql", q, k) / 8**0.5), v)

    def chunked(q, k, v):
        return attend_in_chunks(q, k, v, scale=8**-0.5, chunk=32)

    def gradients(function):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1, 2)))(q, k, v)

    for one, two in zip(gradients(plain), gradients(chunked), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_nothing_to_attend_to_gives_the_mean():
    q, v = jnp.ones((1, 2, 1, 4)), jnp.arange(12.0).reshape(1, 3, 1, 4)
    out = attend(q, jnp.ones((1, 3, 1, 4)), v, keys_BL=jnp.zeros((1, 3), bool))
    np.testing.assert_allclose(out[0, 0, 0], v[0, :, 0].mean(axis=0), rtol=1e-6)


def test_bfloat16_products_accumulate_in_float32():
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    product = matmul(ones, jnp.full((4096, 1), 1.0078125), "bfloat16")
    assert product.dtype == jnp.float32
    assert float(product[0, 0]) == 4096 * 1.0078125


def test_layer_norm_uses_the_population_variance():
    x = jnp.array([1.0, 2.0, 3.0, 6.0])
    np.testing.assert_allclose(layer_norm(x, 0.0), (x - 3) / np.sqrt(3.5), rtol=1e-6)


@pytest.mark.parametrize("inputs, outputs", [(24, 40), (40, 24)])
def test_gradients_of_a_low_precision_product(inputs, outputs):
    """Operands and what comes back are rounded to bfloat16, sums are not: kernels get their gradient in float32."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (3, 50, inputs)), jax.random.normal(keys[1], (inputs, outputs))
    slope = jax.random.normal(keys[2], (3, 50, outputs))
    rounded = [y.astype(jnp.bfloat16).astype(jnp.float32) for y in (x, kernel, slope)]

    @jax.jit
    def pull(x, kernel, slope):
        return jax.vjp(lambda x, kernel: matmul(x, kernel, "bfloat16"), x, kernel)[1](slope)

    dx, dkernel = pull(x, kernel, slope)
    assert dx.dtype == dkernel.dtype == jnp.float32
    np.testing.assert_allclose(dx, jnp.einsum("bso,io->bsi", rounded[2], rounded[1]), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dkernel, jnp.einsum("bsi,bso->io", rounded[0], rounded[2]), rtol=1e-5, atol=1e-4)
