"""attend(): softmax attention, in the form that suits the platform it is traced for.

TPU: a flash kernel. GPU: cuDNN's fused kernel. CPU: one head after the other, some queries at a time. What is short, masked
or biased, or has no kernel, is one batched product per chunk of queries. The logits are never whole. What is long is spread
over a mesh by hand, all else by the compiler.
All take and return (B, S, N, K), no causality; a mask (B, L) of keys that exist is optional.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kavatar_jax.nn.context import Form, attend_on_mesh
from kavatar_jax.nn.dense import attend_densely, backwards_for, blocks_for, pull_densely
from kavatar_jax.parallel import mesh

LONG = 128  # fewer queries or keys are not worth a kernel
KEPT = "attention"  # the name of what `keep_attention` keeps
LAYOUT = ("batch", "tokens", "heads")  # logical axes of queries
QUERY_CHUNK = 256  # queries of all heads at a time: bounds the memory for logits
HEAD_CHUNK = 512  # queries of one head at a time on CPU: measured; larger chunks spill the cache, smaller ones idle,
HEAD_LOGITS = 1 << 19  # so more queries where keys are few


def attend(
    q_BSNK, k_BLNK, v_BLNK,
    *, keys_BL=None, bias_NSL=None, scale: float | None = None, layout: tuple[str | None, ...] = LAYOUT,
):  # fmt: skip
    """softmax(q k^T * scale + bias) v. scale: 1/sqrt(K) if None. A row whose keys are all masked returns the mean of v.

    layout: logical axes of the queries' first three.
    """
    scale = q_BSNK.shape[-1] ** -0.5 if scale is None else scale
    kernel = _kernel(q_BSNK, k_BLNK) if bias_NSL is None and keys_BL is None else None
    if kernel is None:
        return attend_in_chunks(q_BSNK, k_BLNK, v_BLNK, keys_BL=keys_BL, bias_NSL=bias_NSL, scale=scale)
    form = Form(*(form and functools.partial(form, scale=scale) for form in kernel))
    return attend_on_mesh(form, q_BSNK, k_BLNK, v_BLNK, layout=layout)


def keep_attention(primitive, *operands, **settings) -> bool:
    """A policy of jax.checkpoint: of a block, what its tokens' attention to each other gives is kept for the backward pass.

    It is most of a long clip's work and little to keep; attention to a few keys is done again, like all else.
    """
    if primitive.name.startswith("dot_product_attention_fwd"):  # cuDNN's, in which nothing has a name
        return _among_tokens(*operands[:2])
    return jax.checkpoint_policies.save_only_these_names(KEPT)(primitive, *operands, **settings)


def attend_in_chunks(q_BSNK, k_BLNK, v_BLNK, *, keys_BL=None, bias_NSL=None, scale: float, chunk: int = QUERY_CHUNK):
    """The plain form, one chunk of queries at a time; the logits of a chunk are recomputed in the backward pass."""
    k_BNLK, v_BNLK = k_BLNK.swapaxes(1, 2), v_BLNK.swapaxes(1, 2)
    keys = None if keys_BL is None else keys_BL[:, None, None, :]

    def one(q_BQNK, bias_NQL):
        logits = jnp.einsum("bqnk,bnlk->bnql", q_BQNK, k_BNLK, preferred_element_type=jnp.float32) * scale
        logits = logits if bias_NQL is None else logits + bias_NQL
        logits = logits if keys is None else jnp.where(keys, logits, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))).astype(v_BNLK.dtype)
        out = jnp.einsum("bnql,bnlk->bnqk", weights, v_BNLK, preferred_element_type=jnp.float32)
        total = weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)
        return (out / total).swapaxes(1, 2).astype(q_BQNK.dtype)

    if q_BSNK.shape[1] <= chunk:
        return one(q_BSNK, bias_NSL)
    chunks = jax.tree.map(lambda x: _cut(x, 1, chunk), (q_BSNK, bias_NSL))
    out = jax.lax.map(jax.checkpoint(lambda pair: one(*pair)), chunks)
    return _uncut(out, 1, q_BSNK.shape[1])


def attend_head_by_head(q_BSNK, k_BLNK, v_BLNK, *, scale: float, chunk: int | None = None):
    """The form for CPUs: products of plain matrices, small enough for the cache and large enough to be fast."""
    out, _ = part_head_by_head(q_BSNK, k_BLNK, v_BLNK, scale=scale, chunk=chunk)
    return checkpoint_name(out, KEPT) if _among_tokens(q_BSNK, k_BLNK) else out


def part_head_by_head(q_BSNK, k_BLNK, v_BLNK, *, scale: float, chunk: int | None = None):
    """The same, and the logarithm of each query's sum of exponentials, (B, S, N)."""
    B, S, N, K = q_BSNK.shape
    chunk = chunk or max(HEAD_CHUNK, HEAD_LOGITS // k_BLNK.shape[1])

    def head(qkv):
        q_SK, k_KL, v_LK = qkv

        def one(q_QK):
            logits = _product(q_QK, k_KL) * scale
            most = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
            weights = jnp.exp(logits - most).astype(v_LK.dtype)
            total = weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)
            return (_product(weights, v_LK) / total).astype(q_QK.dtype), (most + jnp.log(total))[:, 0]

        chunks = jax.lax.map(jax.checkpoint(one), _cut(q_SK, 0, chunk))
        return tuple(_uncut(x, 0, S) for x in chunks)

    q, v = (x.swapaxes(1, 2).reshape(B * N, -1, K) for x in (q_BSNK, v_BLNK))
    # transposed ahead of the loops: XLA does a transposed bfloat16 product in float32, at half the speed
    k = k_BLNK.transpose(0, 2, 3, 1).reshape(B * N, K, -1)
    out, lse = jax.lax.map(head, (q, k, v))
    return out.reshape(B, N, S, K).swapaxes(1, 2), lse.reshape(B, N, S).swapaxes(1, 2)


def dense(q_BSNK, k_BLNK, v_BLNK, *, scale: float, interpret: bool = False):
    """The TPU kernel and its gradients, on one device. interpret: run it step by step on a host without one."""
    part = functools.partial(part_densely, scale=scale, interpret=interpret)
    pull = functools.partial(pull_densely, scale=scale, interpret=interpret)
    backwards = backwards_for(mesh.device_kind(), q_BSNK.shape[3] * q_BSNK.dtype.itemsize)

    def forwards(*qkv):
        out, lse = part(*qkv)
        if _among_tokens(q_BSNK, k_BLNK):
            out, lse = checkpoint_name(out, KEPT), checkpoint_name(lse, KEPT)
        return out, (*qkv, out, lse)

    form = jax.custom_vjp(lambda *qkv: part(*qkv)[0])
    form.defvjp(forwards, lambda kept, d: pull(*kept, d, backwards))
    return form(q_BSNK, k_BLNK, v_BLNK)


def part_densely(q_BSNK, k_BLNK, v_BLNK, *, scale: float, interpret: bool = False):
    """The same, and the logarithm of each query's sum of exponentials."""
    blocks = blocks_for(mesh.device_kind(), q_BSNK.shape[3] * q_BSNK.dtype.itemsize)
    return attend_densely(q_BSNK, k_BLNK, v_BLNK, blocks, scale=scale, interpret=interpret)


def fused(q_BSNK, k_BLNK, v_BLNK, *, scale: float):
    """cuDNN's kernel, on one device. JAX refuses its gradients for odd numbers of tokens; there they are those of the
    plain form."""
    form = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    if q_BSNK.shape[1] % 2 == 0 and k_BLNK.shape[1] % 2 == 0:
        return form(q_BSNK, k_BLNK, v_BLNK)
    plain = functools.partial(attend_in_chunks, scale=scale)
    form = jax.custom_vjp(form)
    form.defvjp(lambda *qkv: jax.vjp(plain, *qkv), lambda pull, d: pull(d))
    return form(q_BSNK, k_BLNK, v_BLNK)


def _kernel(q_BSNK, k_BLNK):
    """The best unmasked form for this platform, dtype and size, and for parts of the keys; or None."""
    S, L, K = q_BSNK.shape[1], k_BLNK.shape[1], q_BSNK.shape[3]
    if min(S, L) < LONG:
        return None
    if mesh.platform() == "tpu" and K % 64 == 0:
        return dense, part_densely
    if mesh.platform() == "gpu" and q_BSNK.dtype in (jnp.bfloat16, jnp.float16) and K % 8 == 0 and K <= 128:
        return fused, functools.partial(jax.nn.dot_product_attention, implementation="cudnn", return_residual=True)
    if mesh.platform() == "cpu" and S > QUERY_CHUNK:
        return attend_head_by_head, part_head_by_head
    return (attend_in_chunks, None) if S > QUERY_CHUNK else None


def _among_tokens(q_BSNK, k_BLNK) -> bool:
    """Whether it is most of a block's work: no fewer keys than queries, as in attention of tokens to each other."""
    return k_BLNK.shape[1] >= q_BSNK.shape[1]


def _product(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _cut(x, axis: int, chunk: int):
    """Cut an axis into equal chunks of at most `chunk`, zeros at the end, and bring the chunk axis to the front."""
    count = -(-x.shape[axis] // chunk)
    x = _pad(x, axis, count)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :]), axis, 0)


def _uncut(chunks, axis: int, length: int):
    x = jnp.moveaxis(chunks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _pad(x, axis: int, multiple: int):
    """Zeros at the end of an axis, up to a multiple."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding)
