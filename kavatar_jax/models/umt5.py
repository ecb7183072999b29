"""umT5, the text encoder: token ids and the mask of real tokens come in, one vector per token goes out.

The encoder half of umT5 (Chung et al. 2023, UniMax; Raffel et al. 2020, T5): pre-norm blocks with RMS norms and no
biases, attention without scaling, gated GELU, and in every layer a relative-position table of its own. Reference:
Wan-Video/Wan2.1, wan/modules/t5.py, whose names come first in TORCH; those of transformers' UMT5EncoderModel also fit.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from kavatar_jax.checkpoint.bridge import Row, parameter_shapes
from kavatar_jax.config import UMT5Config
from kavatar_jax.nn.attention import attend
from kavatar_jax.nn.layers import Linear, RMSNorm, gelu_tanh
from kavatar_jax.nn.stack import stack
from kavatar_jax.parallel.sharding import at_hand, constrain
from kavatar_jax.types import Params

EPS = 1e-6
MAX_DISTANCE = 128  # of the published encoder; no checkpoint carries it


class UMT5(nn.Module):
    """ids (B, L) int32 and mask (B, L) bool -> (B, L, D). Rows of the tokens that the mask leaves out are zero."""

    config: UMT5Config

    @nn.compact
    def __call__(self, ids_BL, mask_BL):
        c = self.config
        embedding = self.param("embedding", nn.initializers.normal(1.0), (c.vocabulary, c.width), c.param_dtype)
        buckets_LL = jnp.asarray(relative_buckets(ids_BL.shape[1], buckets=c.buckets, max_distance=c.max_distance))
        blocks = stack(Block, layers=c.layers, remat="none", broadcast=2)(c, name="blocks")
        x_BLD, _ = blocks(at_hand(embedding, whole=False)[ids_BL].astype(c.dtype), buckets_LL, mask_BL)
        x_BLD = RMSNorm(EPS, c.dtype, c.param_dtype, name="norm")(x_BLD)
        return jnp.where(mask_BL[..., None], x_BLD, 0)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    config: UMT5Config

    @nn.compact
    def __call__(self, x_BLD, buckets_LL, mask_BL):
        c = self.config
        x_BLD = constrain(x_BLD, "batch", None, None)
        h_BLD = RMSNorm(EPS, c.dtype, c.param_dtype, name="norm_attn")(x_BLD)
        x_BLD = x_BLD + SelfAttention(c, name="attn")(h_BLD, buckets_LL, mask_BL)
        h_BLD = RMSNorm(EPS, c.dtype, c.param_dtype, name="norm_mlp")(x_BLD)
        gate_BLE, up_BLE = (linear_without_bias(c, name, c.mlp)(h_BLD) for name in ("gate", "up"))
        return x_BLD + linear_without_bias(c, "down", c.width)(gelu_tanh(gate_BLE) * up_BLE), None


class SelfAttention(nn.Module):
    """Logits are q k^T + positions[bucket of (key - query), head], not divided by anything."""

    config: UMT5Config

    @nn.compact
    def __call__(self, x_BLD, buckets_LL, mask_BL):
        c = self.config
        q, k, v = (linear_without_bias(c, name, c.heads * c.head_width)(x_BLD) for name in "qkv")
        q, k, v = (x.reshape(*x.shape[:2], c.heads, c.head_width) for x in (q, k, v))
        positions = self.param("positions", nn.initializers.normal(1.0), (c.buckets, c.heads), c.param_dtype)
        bias_NLL = positions.T.astype(jnp.float32)[:, buckets_LL]
        h_BLNK = attend(q, k, v, keys_BL=mask_BL, bias_NSL=bias_NLL, scale=1.0)
        return linear_without_bias(c, "o", c.width)(h_BLNK.reshape(*x_BLD.shape[:2], -1))


def linear_without_bias(config: UMT5Config, name: str, features: int) -> Linear:
    return Linear(features, config.dtype, config.param_dtype, use_bias=False, name=name)


def init(config: UMT5Config, key) -> Params:
    ids_BL = jnp.zeros((1, 1), jnp.int32)
    return dict(UMT5(config).init(key, ids_BL, ids_BL == 0)["params"])


def relative_buckets(length: int, *, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every (query, key) pair, (length, length) int32: the bidirectional buckets of T5.

    Half of them are for keys after the query. In each half the first half holds one distance each, the others grow
    geometrically up to max_distance, and the last takes everything beyond.
    """
    places = np.arange(length)
    offsets_LL = places[None, :] - places[:, None]
    starts = bucket_starts(buckets // 2, max_distance)
    bucket_LL = np.searchsorted(starts, np.abs(offsets_LL), side="right") - 1
    return (bucket_LL + buckets // 2 * (offsets_LL > 0)).astype(np.int32)


def bucket_starts(buckets: int, max_distance: int) -> list[int]:
    """The least distance in each bucket of one direction, in whole numbers: logarithms round either way at powers."""
    exact = buckets // 2
    wide = buckets - exact
    starts, distance = list(range(exact)), exact
    for step in range(wide):
        # log(distance / exact) / log(max_distance / exact) * wide >= step, without the logarithms
        while distance**wide * exact**step < max_distance**step * exact**wide:
            distance += 1
        starts.append(distance)
    return starts


def config_of(shapes: dict[str, tuple[int, ...]], released: dict) -> UMT5Config:
    """The configuration of a checkpoint with these keys and shapes. released: its config.json, {} if there is none."""
    found = parameter_shapes(TORCH, shapes)
    vocabulary, width = found["embedding"]
    layers, buckets, heads = found["blocks/attn/positions"]
    return UMT5Config(
        vocabulary=vocabulary,
        width=width,
        heads=heads,
        head_width=found["blocks/attn/q/kernel"][-1] // heads,
        mlp=found["blocks/up/kernel"][-1],
        layers=layers,
        buckets=buckets,
        max_distance=released.get("relative_attention_max_distance", MAX_DISTANCE),
    )


AXES = {
    r"embedding": ("vocabulary", "embed"),
    r"blocks/attn/[qkv]/kernel": ("layers", "embed", "heads"),
    r"blocks/attn/o/kernel": ("layers", "heads", "embed"),
    r"blocks/attn/positions": ("layers", None, "heads"),
    r"blocks/(gate|up)/kernel": ("layers", "embed", "mlp"),
    r"blocks/down/kernel": ("layers", "mlp", "embed"),
    r"blocks/norm_(attn|mlp)/scale": ("layers", None),
    r"norm/scale": (None,),
}

_ATTENTION, _MLP = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
TORCH = [
    Row("token_embedding.weight|shared.weight", "embedding", "vd->vd"),
    Row(f"blocks.{{}}.norm1.weight|{_ATTENTION}.layer_norm.weight", "blocks/norm_attn/scale", "d->d"),
    *(
        Row(f"blocks.{{}}.attn.{n}.weight|{_ATTENTION}.SelfAttention.{n}.weight", f"blocks/attn/{n}/kernel", "oi->io")
        for n in "qkvo"
    ),
    Row(
        f"blocks.{{}}.pos_embedding.embedding.weight|{_ATTENTION}.SelfAttention.relative_attention_bias.weight",
        "blocks/attn/positions",
        "bn->bn",
    ),
    Row(f"blocks.{{}}.norm2.weight|{_MLP}.layer_norm.weight", "blocks/norm_mlp/scale", "d->d"),
    Row(f"blocks.{{}}.ffn.gate.0.weight|{_MLP}.DenseReluDense.wi_0.weight", "blocks/gate/kernel", "oi->io"),
    Row(f"blocks.{{}}.ffn.fc1.weight|{_MLP}.DenseReluDense.wi_1.weight", "blocks/up/kernel", "oi->io"),
    Row(f"blocks.{{}}.ffn.fc2.weight|{_MLP}.DenseReluDense.wo.weight", "blocks/down/kernel", "oi->io"),
    Row("norm.weight|encoder.final_layer_norm.weight", "norm/scale", "d->d"),
]

UNUSED = (r"encoder\.embed_tokens\.weight",)  # transformers' second name for shared.weight
