"""One clip over several devices: Ulysses, a ring, or both, give the numbers of one device, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kavatar_jax.nn.attention import attend
from kavatar_jax.nn.context import join
from kavatar_jax.parallel.mesh import make_mesh
from tools.benchmarks.hlo import cost_of


def draw(B, S, N, K):
    return tuple(jax.random.normal(key, (B, S, N, K)) for key in jax.random.split(jax.random.key(0), 3))


def both_ways(*arrays):
    return attend(*arrays), *jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2))(*arrays)


CASES = {  # batch, heads, mesh
    "heads divide": (1, 8, (1, 1, 8, 1)),
    "branches divide where heads do not": (3, 4, (1, 1, 4, 2)),
    "four at a time and a ring of two": (3, 12, (1, 1, 8, 1)),
    "a ring alone": (1, 3, (1, 1, 8, 1)),
    "clips, heads and tokens": (2, 12, (2, 1, 2, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_over_devices_give_the_numbers_of_one(case):
    batch, heads, sizes = CASES[case]
    arrays = draw(batch, 264, heads, 8)
    alone = jax.jit(both_ways)(*arrays)
    with jax.set_mesh(make_mesh(*sizes)):
        spread = jax.jit(both_ways)(*arrays)
    for mine, other in zip(spread, alone, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-6)


def test_parts_of_the_keys_join_to_the_whole():
    q, k, v = draw(1, 5, 2, 8)
    logits = jnp.einsum("bqnk,blnk->bqnl", q, k) * 9
    logits = logits.at[..., :2].add(-200)  # one part may count for nothing

    def part(span):
        out = jnp.einsum("bqnl,blnk->bqnk", jax.nn.softmax(logits[..., span]), v[:, span])
        return out, jax.nn.logsumexp(logits[..., span], axis=-1)

    joined = join(*part(slice(0, 2)), *part(slice(2, 5)))
    for mine, whole in zip(joined, part(slice(0, 5)), strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("heads", "kinds"), [(8, {"all-to-all"}), (4, {"all-to-all", "collective-permute"})])
def test_heads_for_tokens_send_less_than_all_keys(heads, kinds):
    """Queries, keys, values and the result each leave a device once, less its own part; a ring adds half of the keys."""
    S, K, P = 512, 8, 8
    with jax.set_mesh(make_mesh(1, 1, P, 1)) as _:
        tokens = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, "context"))
        array = jax.ShapeDtypeStruct((1, S, heads, K), jnp.float32, sharding=tokens)
        cost = cost_of(jax.jit(attend, out_shardings=tokens).lower(array, array, array).compile().as_text())
    assert set(cost.sent) == kinds
    group, shard = min(heads, P), 4 * S * heads * K // P
    assert cost.sent["all-to-all"] == 4 * shard * (group - 1) / group
    assert cost.sent["collective-permute"] == 2 * shard * (P // group - 1)
    assert cost.products == pytest.approx(4 * S * S * heads * K / P, rel=0.01)
