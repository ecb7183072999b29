"""Attention of all queries to all keys on a TPU: a flash kernel (Dao et al., arXiv 2205.14135) with no mask to look up.

Logits stand upright, keys down and queries across, so that a query's maximum and sum are taken along the cheap axis and its
running state is one row. Powers of two in place of e: the factor between them goes into the queries. The last keys are
cut to those that exist, so only their chunk is compared with a limit, and no later chunk is looked at.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LOG2E = math.log2(math.e)


class Blocks(NamedTuple):
    """Most queries of a block, most keys of a block, and most keys whose logits are held at once."""

    queries: int
    keys: int
    chunk: int


class Backwards(NamedTuple):
    """Blocks of the backward pass. held: bytes for gradients of queries that wait; room: for its kernel, or None"""

    blocks: Blocks
    held: int
    room: int | None


# Keys and values are read again for every block of queries: 1 FLOP a byte for every query of it. A chip needs FLOP/s over
# B/s of its memory (v5e 240, v5p 166, v6e 560, tpu7x 313) just to keep up, so blocks have about four times that. A step of
# the grid costs about a third of a microsecond: with 2048 keys it has two (tpu7x) to five (v5e) to do. Logits and their
# powers take 10 bytes for every query and key of a chunk: 5 MiB of the 16 of a v5's kernel, 10 of the others' 32.
BLOCKS = {
    "TPU v5 lite": Blocks(1024, 2048, 512),
    "TPU v5": Blocks(1024, 2048, 512),
    "TPU v6 lite": Blocks(2048, 2048, 512),
    "TPU7x": Blocks(2048, 2048, 512),
}
WIDE = Blocks(512, 512, 512)  # for heads of more than 256 bytes, and chips not known
# Backwards, queries and gradients of what they found are read again for every block of keys: 2.5 FLOPs a byte for every key
# of it. Weights and what is pulled back through them take 16 bytes for every query and key of a chunk, 8 MiB; gradients of
# 65,536 queries of 128 take 32. The smallest of these chips has 64 MiB for a core, chips not known may have 16.
ROOMY = Backwards(Blocks(1024, 1024, 512), 32 * 2**20, 60 * 2**20)
NARROW = Backwards(WIDE, 2 * 2**20, None)


def blocks_for(device_kind: str, head_bytes: int) -> Blocks:
    return BLOCKS.get(device_kind, WIDE) if head_bytes <= 256 else WIDE


def backwards_for(device_kind: str, head_bytes: int) -> Backwards:
    return ROOMY if device_kind in BLOCKS and head_bytes <= 256 else NARROW


def attend_densely(q_BSNK, k_BLNK, v_BLNK, blocks: Blocks, *, scale: float, interpret: bool = False):
    """softmax(q k^T * scale) v as (B, S, N, K), and the logarithm of each query's sum of exponentials, (B, S, N) float32.

    interpret: run it step by step on a host without a TPU
    """
    (B, S, N, K), L = q_BSNK.shape, k_BLNK.shape[1]
    queries, keys, chunk = _fit(blocks, S, L)
    q = (q_BSNK * (scale * LOG2E)).astype(q_BSNK.dtype)
    q, k, v = _heads_first(q, 0), *(_heads_first(x, -L % keys) for x in (k_BLNK, v_BLNK))
    by_query = pl.BlockSpec((None, queries, K), lambda n, i, j: (n, i, 0))
    by_key = pl.BlockSpec((None, keys, K), lambda n, i, j: (n, j, 0))
    out, lse = pl.pallas_call(
        functools.partial(_attend, keys=L, chunk=chunk),
        grid=(B * N, -(-S // queries), -(-L // keys)),
        in_specs=[by_query, by_key, by_key],
        out_specs=[by_query, pl.BlockSpec((None, 1, queries), lambda n, i, j: (n, 0, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B * N, 1, S), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((rows, queries), jnp.float32) for rows in (1, 1, K)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * S * L * K,
            transcendentals=B * N * S * L,
            bytes_accessed=2 * q.dtype.itemsize * B * N * K * (S + L * -(-S // queries)),
        ),
        name="dense_attention",
        interpret=interpret,
    )(q, k, v)
    return _heads_last(out, B, S), _heads_last(lse[:, 0], B, S)


def pull_densely(
    q_BSNK, k_BLNK, v_BLNK, out_BSNK, lse_BSN, d_BSNK, form: Backwards, *, scale: float, interpret: bool = False
):
    """Gradients of queries, keys and values, each of its shape and dtype, from `d`, those of `out`.

    Five products in one pass over the logits (FlashAttention-2, arXiv 2307.08691, algorithm 2): gradients of keys and values
    are added up one block of keys after the other, while those of queries, as many as there is room for in float32, wait
    beside them. With more queries, those of keys and values are added up again after the kernel.

    out, lse: what attend_densely gave
    """
    (B, S, N, K), L, dtype = q_BSNK.shape, k_BLNK.shape[1], q_BSNK.dtype
    queries, keys, chunk = _fit(form.blocks, S, L)
    spans = -(-S // (max(1, form.held // (4 * K * queries)) * queries))
    span = -(-S // (queries * spans))  # blocks of queries
    total = spans * span * queries
    q = _heads_first((q_BSNK * (scale * LOG2E)).astype(dtype), total - S)
    k, v = (_heads_first(x, -L % keys) for x in (k_BLNK, v_BLNK))
    d = _heads_first(d_BSNK.astype(dtype), total - S)
    lse = _heads_first(lse_BSN * LOG2E, total - S, jnp.inf)[:, None]  # queries that do not exist have no weights
    along = (d_BSNK.astype(jnp.float32) * out_BSNK.astype(jnp.float32)).sum(axis=-1)
    along = _heads_first(along, total - S)[:, None]
    last = k.shape[1] // keys - 1
    by_query = pl.BlockSpec((None, queries, K), lambda n, s, j, i: (n, s * span + i, 0))
    of_query = pl.BlockSpec((None, 1, queries), lambda n, s, j, i: (n, 0, s * span + i))
    by_key = pl.BlockSpec((None, keys, K), lambda n, s, j, i: (n, j, 0))
    once = pl.BlockSpec((None, queries, K), lambda n, s, j, i: (n, s * span + jnp.where(j == last, i, 0), 0))
    by_span = pl.BlockSpec((None, None, keys, K), lambda n, s, j, i: (s, n, j, 0))
    sums = jax.ShapeDtypeStruct((spans, *k.shape), dtype if spans == 1 else jnp.float32)
    dq, dk, dv = pl.pallas_call(
        functools.partial(_pull, keys=L, chunk=chunk, scale=scale),
        grid=(B * N, spans, last + 1, span),
        in_specs=[by_query, by_key, by_key, of_query, by_query, of_query],
        out_specs=[once, by_span, by_span],
        out_shape=[jax.ShapeDtypeStruct(q.shape, dtype), sums, sums],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((span, K, queries), (keys, K), (keys, K))],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=form.room
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * B * N * S * L * K,
            transcendentals=B * N * S * L,
            bytes_accessed=2 * dtype.itemsize * B * N * K * (2 * L + S * (1 + L // keys)),
        ),
        name="attention_gradients",
        interpret=interpret,
    )(q, k, v, lse, d, along)
    dk, dv = (x.sum(axis=0).astype(dtype) for x in (dk, dv))
    return _heads_last(dq, B, S), _heads_last(dk, B, L), _heads_last(dv, B, L)


def _heads_first(x_BSN, pad: int, fill: float = 0.0):
    """(B, S, N, ...) -> (B * N, S + pad, ...)"""
    B, S, N, *rest = x_BSN.shape
    x = x_BSN.swapaxes(1, 2).reshape(B * N, S, *rest)
    return jnp.pad(x, ((0, 0), (0, pad), *((0, 0) for _ in rest)), constant_values=fill)


def _heads_last(x, batch: int, tokens: int):
    """And back, without what was padded."""
    return x[:, :tokens].reshape(batch, -1, tokens, *x.shape[2:]).swapaxes(1, 2)


def _fit(blocks: Blocks, S: int, L: int) -> Blocks:
    """The blocks for so many queries and keys."""
    chunk = block_of(L, blocks.chunk)
    return Blocks(block_of(S, blocks.queries), chunk * max(1, min(blocks.keys // chunk, -(-L // chunk))), chunk)


def block_of(tokens: int, most: int) -> int:
    """Tokens of a block: whole lanes, at most `most`, chosen to pad little and then to be large."""
    if tokens <= most:
        return LANES * -(-tokens // LANES)
    return min(range(max(LANES, most // 2), most + 1, LANES), key=lambda block: (-tokens % block, -block))


def _attend(q_ref, k_ref, v_ref, out_ref, lse_ref, most_ref, total_ref, sum_ref, *, keys: int, chunk: int):
    """One block of queries and one of keys. most, total: (1, queries); sum: (K, queries), all in units of powers of two."""
    j, last, block = pl.program_id(2), pl.num_programs(2) - 1, k_ref.shape[0]

    @pl.when(j == 0)
    def _():
        most_ref[...] = jnp.full_like(most_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(start: int, real: int):
        here = pl.ds(start, chunk)
        logits = _dot(k_ref[here, :], q_ref[...], (1, 1))
        if real < chunk:
            logits = jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) < real, logits, -jnp.inf)
        before = most_ref[...]
        most = jnp.maximum(before, logits.max(axis=0, keepdims=True))
        weights, kept = jnp.exp2(logits - most), jnp.exp2(before - most)
        most_ref[...] = most
        total_ref[...] = kept * total_ref[...] + weights.sum(axis=0, keepdims=True)
        sum_ref[...] = kept * sum_ref[...] + _dot(v_ref[here, :], weights.astype(v_ref.dtype), (0, 0))

    _over_keys(add, j, last, block, keys, chunk)

    @pl.when(j == last)
    def _():
        out_ref[...] = (sum_ref[...] / total_ref[...]).T.astype(out_ref.dtype)
        lse_ref[...] = (most_ref[...] + jnp.log2(total_ref[...])) / LOG2E


def _pull(
    q_ref, k_ref, v_ref, lse_ref, d_ref, along_ref, dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum,
    *, keys: int, chunk: int, scale: float,
):  # fmt: skip
    """One block of keys and one of queries; logits stand upright here too.

    along: (1, queries) what of `d` goes along `out`, which weights that add up to one cannot follow
    dq_sum: (blocks of queries, K, queries); dk_sum, dv_sum: (keys, K)
    """
    j, i = pl.program_id(2), pl.program_id(3)
    last, block = pl.num_programs(2) - 1, k_ref.shape[0]

    @pl.when(j == 0)
    def _():
        dq_sum[i] = jnp.zeros_like(dq_sum[i])

    @pl.when(i == 0)
    def _():
        dk_sum[...], dv_sum[...] = jnp.zeros_like(dk_sum), jnp.zeros_like(dv_sum)

    def add(start: int, real: int):
        here = pl.ds(start, chunk)
        logits = _dot(k_ref[here, :], q_ref[...], (1, 1))
        if real < chunk:
            logits = jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) < real, logits, -jnp.inf)
        weights = jnp.exp2(logits - lse_ref[...])
        pulled = weights * (_dot(v_ref[here, :], d_ref[...], (1, 1)) - along_ref[...])
        weights, pulled = weights.astype(d_ref.dtype), pulled.astype(q_ref.dtype)
        dv_sum[here, :] += _dot(weights, d_ref[...], (1, 0))
        dk_sum[here, :] += _dot(pulled, q_ref[...], (1, 0))
        dq_sum[i] += _dot(k_ref[here, :], pulled, (0, 0))

    _over_keys(add, j, last, block, keys, chunk)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk_ref[...] = (dk_sum[...] / LOG2E).astype(dk_ref.dtype)  # queries carry the scale, and the base of the powers
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when(j == last)
    def _():
        dq_ref[...] = (dq_sum[i].T * scale).astype(dq_ref.dtype)


def _over_keys(add, j, last, block: int, keys: int, chunk: int):
    """Every chunk of this block of keys, and in the last block those that exist, of all `keys`."""

    def add_all(real: int):
        for start in range(0, real, chunk):
            add(start, min(chunk, real - start))

    pl.when(j < last)(lambda: add_all(block))
    pl.when(j == last)(lambda: add_all(keys - (-(-keys // block) - 1) * block))


def _dot(a, b, axes: tuple[int, int]):
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)
