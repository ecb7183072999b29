"""One clip over several devices: Ulysses, a ring, or both, give the numbers of one device, forwards and backwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kavatar_jax.nn.attention import attend
from kavatar_jax.nn.context import join
from kavatar_jax.nn.frames import heard_to_tokens, tokens_to_heard
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


def test_queries_that_do_not_divide_are_shared_all_the_same():
    arrays, P = draw(1, 515, 3, 8), 8
    alone = jax.jit(both_ways)(*arrays)
    with jax.set_mesh(make_mesh(1, 1, P, 1)):
        spread = jax.jit(both_ways)(*arrays)
        cost = cost_of(jax.jit(attend).lower(*arrays).compile().as_text())
    for mine, other in zip(spread, alone, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-6)
    assert cost.products == pytest.approx(4 * 520 * 515 * 3 * 8 / P, rel=0.01)


def test_what_has_no_kernel_is_shared_too(monkeypatch):
    """A picture's own attention, wider than cuDNN takes: every device has its positions' queries and is sent all keys."""
    monkeypatch.setattr("kavatar_jax.parallel.mesh.platform", lambda: "gpu")
    S, K, P = 1040, 192, 8
    attend_over_all = functools.partial(attend, layout=(None, "positions", None))
    arrays = draw(1, S, 1, K)
    alone = jax.jit(attend)(*arrays)
    with jax.set_mesh(make_mesh(2, 1, 4, 1)):
        whole = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, ("data", "context")))
        program = jax.jit(attend_over_all, in_shardings=whole, out_shardings=whole)
        cost = cost_of(program.lower(*arrays).compile().as_text())
        np.testing.assert_allclose(program(*arrays), alone, atol=2e-6)
    assert cost.products == pytest.approx(4 * S * S * K / P, rel=0.01)
    assert cost.sent == {"all-gather": 2 * S * K * 4 * (P - 1) / P}


FRAMES = {  # clips, frames, tokens of one, mesh
    "parts that are no frames": (1, 6, 20, (1, 1, 8, 1)),
    "parts of one frame or two": (1, 3, 40, (1, 1, 8, 1)),
    "some frames each": (2, 4, 9, (2, 1, 2, 2)),
    "one for all": (2, 1, 16, (2, 1, 4, 1)),
    "tokens that do not divide": (1, 3, 5, (1, 1, 4, 2)),
}


def hearing(q, k, v):
    """Some frames hear less than others."""
    B, T, A = k.shape[:3]
    heard = jnp.arange(A) < jnp.array([7, 3, 5, 6, 1, 7])[:T, None]
    return tokens_to_heard(q, k, v, jnp.broadcast_to(heard, (B, T, A)))


@pytest.mark.parametrize("case", FRAMES)
@pytest.mark.parametrize(("attention", "sent"), [(hearing, set()), (heard_to_tokens, {"all-reduce"})])
def test_frames_over_devices_give_the_numbers_of_one(attention, sent, case):
    """No token is sent: those that hear have the keys with them, and of those that are looked at, sums are added up."""
    B, T, tokens, sizes = FRAMES[case]
    row, heard = draw(B, T * tokens, 2, 8), (x.reshape(B, T, 7, 2, 8) for x in draw(B, T * 7, 2, 8))
    arrays = (row[0], *list(heard)[1:]) if attention is hearing else (next(heard), *row[1:])

    def both_ways(*arrays):
        return attention(*arrays), *jax.grad(lambda *x: jnp.sum(jnp.sin(attention(*x))), (0, 1, 2))(*arrays)

    alone = jax.jit(both_ways)(*arrays)
    with jax.set_mesh(mesh := make_mesh(*sizes)):
        for mine, other in zip(jax.jit(both_ways)(*arrays), alone, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-6, atol=2e-6)
        if T * tokens % sizes[2]:
            return
        places = {4: jax.P(("data", "fsdp"), "context", "tensor"), 5: jax.P(("data", "fsdp"), None, None, "tensor")}
        shapes = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, places[x.ndim])) for x in arrays
        ]
        program = jax.jit(attention, out_shardings=shapes[0].sharding).lower(*shapes).compile()
    assert set(cost_of(program.as_text()).sent) == sent
