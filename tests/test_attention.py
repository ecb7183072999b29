"""Every form of attention gives the numbers of the plain one, forwards and backwards, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kavatar_jax.nn.attention import attend, attend_head_by_head, dense, keep_attention
from kavatar_jax.nn.dense import Backwards, Blocks, attend_densely, block_of, pull_densely
from kavatar_jax.parallel.mesh import make_mesh
from tools.benchmarks.hlo import cost_of


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


@pytest.mark.parametrize(
    ("queries", "keys", "head", "blocks", "held"),
    [
        (200, 137, 64, (128, 128, 128), 1 << 20),
        (
            300,
            700,
            128,
            (128, 256, 128),
            1 << 20,
        ),  # three blocks of queries, the last of three blocks of keys half empty
        (700, 300, 64, (128, 128, 128), 2 * 128 * 64 * 4),  # gradients of two blocks of queries at a time
        (130, 256, 128, (1024, 2048, 512), 1 << 20),
    ],
)
def test_gradients_of_the_dense_kernel_are_those_of_the_plain_form(queries, keys, head, blocks, held):
    """Also for queries and keys that only fill up their blocks, and where one key outweighs all."""
    q, k, v = draw(2, queries, keys, 2, head)
    k, scale = k.at[:, keys // 2].mul(4), head**-0.5
    out, pull = jax.vjp(functools.partial(plain, scale=scale), q, k, v)
    lse = jax.nn.logsumexp(jnp.einsum("bqnk,blnk->bqnl", q, k) * scale, axis=-1)
    d = jnp.cos(out)
    found = pull_densely(q, k, v, out, lse, d, Backwards(Blocks(*blocks), held, None), scale=scale, interpret=True)
    for mine, other in zip(found, pull(d), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5 * np.abs(other).max())


def test_gradients_do_not_come_of_memory_that_nobody_wrote():
    """In the interpreter that follows a TPU's memories, with NaN in all that is fresh: gradients of two spans of queries."""
    q, k, v = draw(1, 300, 200, 1, 64)
    out, pull = jax.vjp(functools.partial(plain, scale=0.125), q, k, v)
    lse = jax.nn.logsumexp(jnp.einsum("bqnk,blnk->bqnl", q, k) * 0.125, axis=-1)
    form = Backwards(Blocks(128, 128, 128), 2 * 128 * 64 * 4, None)
    memories = pltpu.InterpretParams(uninitialized_memory="nan")
    assert_same(pull_densely(q, k, v, out, lse, out, form, scale=0.125, interpret=memories), pull(out))


def test_gradients_through_the_dense_kernel_are_those_of_the_plain_form():
    arrays = draw(1, 130, 137, 2, 64)
    form = functools.partial(dense, scale=0.1, interpret=True)
    assert_same(both_ways(form, *arrays), both_ways(functools.partial(plain, scale=0.1), *arrays))


def test_gradients_in_bfloat16_are_as_near_as_its_digits():
    arrays = draw(1, 260, 390, 2, 64)
    exact = both_ways(functools.partial(plain, scale=0.125), *arrays)
    narrow = both_ways(functools.partial(dense, scale=0.125, interpret=True), *(x.astype(jnp.bfloat16) for x in arrays))
    for mine, other in zip(narrow, exact, strict=True):
        assert mine.dtype == jnp.bfloat16
        assert float(jnp.abs(mine - other).max() / jnp.abs(other).max()) < 2**-6


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


@pytest.mark.parametrize(("keys", "again"), [(400, 0), (200, 1)])
def test_what_attention_among_tokens_gives_can_be_kept_for_the_backward_pass(keys, again):
    """The plain policy attends once more before gradients are taken; kept, only to what is shorter than the clip."""
    q, k, v = draw(1, 400, keys, 2, 32)

    def work(remat):
        def block(carry, _):
            return carry + jnp.sin(attend(carry, k, v)), None

        blocks = jax.checkpoint(block, policy=remat, prevent_cse=False)
        run = jax.jit(jax.value_and_grad(lambda q: jax.lax.scan(blocks, q, length=3)[0].sum()))
        return cost_of(run.lower(q).compile().as_text()).flops, run(q)

    alone, (value, gradient) = work(jax.checkpoint_policies.nothing_saveable)
    kept, (same_value, same_gradient) = work(keep_attention)
    np.testing.assert_allclose(same_value, value, rtol=1e-6)
    np.testing.assert_allclose(same_gradient, gradient, atol=1e-5)
    once = 3 * 4 * 2 * 400 * keys * 32
    assert alone - kept == (1 - again) * once
