"""How attention is spread over the mesh: clips over data and fsdp, heads over tensor, tokens over context.

Over context, where queries and keys are the tokens of one clip: Ulysses (DeepSpeed-Ulysses, arXiv 2309.14509) exchanges
tokens for heads, so that a device has all the tokens of some heads, and sends P / 2 times less than gathering all keys on P
devices would. Branches of guidance are heads like any others. What the number of heads does not divide is left to a ring
(arXiv 2310.01889): keys go round from device to device while queries stay, and partial results are added up as they come.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kavatar_jax.parallel.sharding import mesh_axis, parts, place_of


class Form(NamedTuple):
    """A way to attend on one device: q, k, v -> (B, S, N, K), and, if `part` is not None, the same with the logarithm of
    each query's sum of exponentials, (B, S, N) float32."""

    whole: Callable
    part: Callable | None = None


def attend_on_mesh(form: Form, q_BSNK, k_BLNK, v_BLNK, *, layout: tuple[str | None, ...]):
    """form.whole, by hand on every device. Clips or heads that do not divide are repeated, and queries that do not filled up
    with zeros; keys that are not the queries' own tokens, or whose queries do not divide or lie over more than the tokens'
    axis, are gathered."""
    axes = jax.sharding.get_abstract_mesh()
    if axes.empty or axes.size == 1:
        return form.whole(q_BSNK, k_BLNK, v_BLNK)
    clips, tokens, heads = layout
    count = q_BSNK.shape[1]
    if missing := -count % parts(tokens, axes):
        q_BSNK = jnp.pad(q_BSNK, ((0, 0), (0, missing), (0, 0), (0, 0)))
        return attend_on_mesh(form, q_BSNK, k_BLNK, v_BLNK, layout=layout)[:, :count]
    queries = place_of(q_BSNK.shape, (clips, tokens, heads, None), axes).spec
    keys, run = place_of(k_BLNK.shape, (clips, None, heads, None), axes).spec, form.whole
    if tokens == "tokens" and queries[1] is not None and q_BSNK.shape == k_BLNK.shape:
        keys, run = queries, functools.partial(_in_context, form, mesh_axis("tokens"), axes.shape[mesh_axis("tokens")])
    spread = jax.shard_map(run, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)
    return spread(q_BSNK, k_BLNK, v_BLNK)


def _in_context(form: Form, axis: str, size: int, *qkv):
    """Ulysses in groups of neighbours, as many as divide the heads of all branches, and a ring from group to group."""
    B, S, N, K = qkv[0].shape
    group = math.gcd(B * N, size)
    q, k, v = (_heads_apart(x.swapaxes(0, 1).reshape(1, S, B * N, K), axis, size, group) for x in qkv)
    out = form.whole(q, k, v) if group == size else _ring(form, axis, size, group, q, k, v)
    return _tokens_apart(out, axis, size, group).reshape(S, B, N, K).swapaxes(0, 1)


def _heads_apart(x_1SNK, axis: str, size: int, group: int):
    return _exchange(x_1SNK, axis, size, group, split=2, concat=1)


def _tokens_apart(x_1SNK, axis: str, size: int, group: int):
    return _exchange(x_1SNK, axis, size, group, split=1, concat=2)


def _exchange(x, axis: str, size: int, group: int, *, split: int, concat: int):
    if group == 1:
        return x
    groups = [list(range(first, first + group)) for first in range(0, size, group)]
    return jax.lax.all_to_all(x, axis, split, concat, axis_index_groups=groups, tiled=True)


def _ring(form: Form, axis: str, size: int, group: int, q, k, v):
    """All keys pass every device, those of the next group on their way while the present ones are attended to.

    Gradients take the way over gathered keys, which the backward pass needs whole anyway.
    """
    groups = [list(range(first, size, group)) for first in range(group)]
    onwards = [(device, (device + group) % size) for device in range(size)]

    def gathered(q, k, v):
        k, v = (jax.lax.all_gather(x, axis, axis=1, axis_index_groups=groups, tiled=True) for x in (k, v))
        return form.whole(q, k, v)

    if form.part is None:
        return gathered(q, k, v)
    part = form.part

    def passed(q, k, v):
        out, lse = part(q, k, v)
        for _ in range(size // group - 1):
            k, v = jax.lax.ppermute((k, v), axis, onwards)
            out, lse = join(out, lse, *part(q, k, v))
        return out.astype(q.dtype)

    ring = jax.custom_vjp(passed)
    ring.defvjp(lambda *qkv: jax.vjp(gathered, *qkv), lambda pull, d: pull(d))
    return ring(q, k, v)


def join(out_BSNK, lse_BSN, other_BSNK, other_lse_BSN):
    """Attention over two sets of keys from attention over each, float32."""
    lse = jnp.logaddexp(lse_BSN, other_lse_BSN)
    first, second = (jnp.exp(x - lse)[..., None] for x in (lse_BSN, other_lse_BSN))
    return first * out_BSNK + second * other_BSNK, lse
