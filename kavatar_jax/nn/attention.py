"""attend(): softmax attention, in the form that suits the platform it is traced for.

CPU: chunks of queries against all keys, so that the logits are never whole. GPU: cuDNN's fused kernel. TPU: splash.
All take and return (B, S, N, K), no causality; a mask (B, L) of keys that exist is optional.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from kavatar_jax.parallel import mesh
from kavatar_jax.parallel.sharding import spec

QUERY_CHUNK = 256  # measured on CPU: larger chunks spill the cache, smaller ones starve the matrix product


def attend(q_BSNK, k_BLNK, v_BLNK, *, keys_BL=None, bias_NSL=None, scale: float | None = None):
    """softmax(q k^T * scale + bias) v. scale: 1/sqrt(K) if None. A row whose keys are all masked returns the mean of v."""
    scale = q_BSNK.shape[-1] ** -0.5 if scale is None else scale
    long = k_BLNK.shape[1] >= 128 and q_BSNK.shape[1] >= 128
    plain = bias_NSL is None and keys_BL is None
    if mesh.platform() == "tpu" and plain and long and q_BSNK.shape[-1] % 128 == 0:
        return _splash(q_BSNK, k_BLNK, v_BLNK, scale)
    if mesh.platform() == "gpu" and plain and q_BSNK.dtype in (jnp.bfloat16, jnp.float16) and q_BSNK.shape[-1] <= 128:
        return jax.nn.dot_product_attention(q_BSNK, k_BLNK, v_BLNK, scale=scale, implementation="cudnn")
    return attend_in_chunks(q_BSNK, k_BLNK, v_BLNK, keys_BL=keys_BL, bias_NSL=bias_NSL, scale=scale)


def attend_in_chunks(q_BSNK, k_BLNK, v_BLNK, *, keys_BL=None, bias_NSL=None, scale: float, chunk: int = QUERY_CHUNK):
    """The plain form, one chunk of queries at a time; the logits of a chunk are recomputed in the backward pass."""
    S = q_BSNK.shape[1]
    k_BNLK, v_BNLK = k_BLNK.swapaxes(1, 2), v_BLNK.swapaxes(1, 2)
    keys = None if keys_BL is None else keys_BL[:, None, None, :]

    def one(q_BQNK, bias_NQL):
        logits = jnp.einsum("bqnk,bnlk->bnql", q_BQNK, k_BNLK, preferred_element_type=jnp.float32) * scale
        logits = logits if bias_NQL is None else logits + bias_NQL
        logits = logits if keys is None else jnp.where(keys, logits, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
        out = jnp.einsum("bnql,bnlk->bqnk", weights.astype(v_BNLK.dtype), v_BNLK, preferred_element_type=jnp.float32)
        return (out / weights.sum(axis=-1).swapaxes(1, 2)[..., None]).astype(q_BQNK.dtype)

    if S <= chunk:
        return one(q_BSNK, bias_NSL)
    count = S // chunk
    body = slice(0, count * chunk)
    q_chunks = _split(q_BSNK[:, body], 1, count)
    bias_chunks = None if bias_NSL is None else _split(bias_NSL[:, body], 1, count)
    out = jax.lax.map(jax.checkpoint(lambda pair: one(*pair)), (q_chunks, bias_chunks))
    out = jnp.moveaxis(out, 0, 1).reshape(q_BSNK.shape[0], count * chunk, *q_BSNK.shape[2:])
    if S % chunk:
        tail = one(q_BSNK[:, count * chunk :], None if bias_NSL is None else bias_NSL[:, count * chunk :])
        out = jnp.concatenate([out, tail], axis=1)
    return out


def _split(x, axis, count):
    """Cut an axis into `count` chunks and bring the chunk axis to the front."""
    shape = (*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _splash(q_BSNK, k_BLNK, v_BLNK, scale):
    """The TPU kernel, manual over every mesh axis: batch over data and fsdp, heads over tensor.

    Keys are gathered over context, queries stay where they are.
    """
    axes = jax.sharding.get_abstract_mesh()
    heads = P(*spec("batch", None, "heads", None))
    queries = P(*spec("batch", "tokens", "heads", None))
    kernel = functools.partial(_splash_on_one_device, scale=scale)
    if axes.empty or axes.size == 1:
        return kernel(q_BSNK, k_BLNK, v_BLNK)
    return jax.shard_map(kernel, in_specs=(queries, heads, heads), out_specs=queries, check_vma=False)(q_BSNK, k_BLNK, v_BLNK)


def _splash_on_one_device(q_BSNK, k_BLNK, v_BLNK, *, scale):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    S, L, N = q_BSNK.shape[1], k_BLNK.shape[1], q_BSNK.shape[2]
    block_q, block_kv = (min(1024, 128 * -(-n // 128)) for n in (S, L))
    q, k, v = (_pad_tokens(x, block).swapaxes(1, 2) for x, block in ((q_BSNK, block_q), (k_BLNK, block_kv), (v_BLNK, block_kv)))
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * N)
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    # padded keys carry another segment than every real token, so nothing attends to them
    real_q, real_kv = (np.arange(n) < m for n, m in ((q.shape[2], S), (k.shape[2], L)))
    segments = splash.SegmentIds(q=jnp.ones(real_q.shape, jnp.int32), kv=jnp.asarray(real_kv, jnp.int32))
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q * scale, k, v, segments)
    return out.swapaxes(1, 2)[:, :S].astype(q_BSNK.dtype)


def _pad_tokens(x_BSNK, block):
    return jnp.pad(x_BSNK, ((0, 0), (0, -x_BSNK.shape[1] % block), (0, 0), (0, 0)))
