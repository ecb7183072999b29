"""CLIP's visual tower: a portrait comes in, its tokens for the diffusion transformer and one embedding of it go out.

A ViT with pre-norm blocks and exact GELU (Radford et al. 2021; the ViT-H/14 of open-CLIP's XLM-RoBERTa model).
Reference: Wan-Video/Wan2.1, wan/modules/clip.py, the `visual.*` keys of its checkpoint.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.checkpoint.bridge import Row, linear, norm, parameter_shapes, table
from kavatar_jax.config import CLIPConfig
from kavatar_jax.media import image
from kavatar_jax.nn.attention import attend
from kavatar_jax.nn.layers import LayerNorm, Linear, gelu_erf, matmul
from kavatar_jax.nn.stack import stack
from kavatar_jax.parallel.sharding import constrain
from kavatar_jax.types import Params

EPS = 1e-5
HEAD_WIDTH = 80  # of ViT-H/14; no checkpoint carries it
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the training images, RGB in [0, 1] (Radford et al. 2021, their code)
STD = (0.26862954, 0.26130258, 0.27577711)


class Outputs(NamedTuple):
    """tokens: (B, 1 + patches, D) after all blocks but the last, raw: what the Wan models attend to.

    embedding: (B, embedding) the last block's class token, normed and projected; cosines of two compare what they show.
    """

    tokens: jax.Array
    embedding: jax.Array


class CLIP(nn.Module):
    """pixels (B, image_size, image_size, 3), as `preprocess` makes them -> Outputs."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, pixels_BHWC) -> Outputs:
        c = self.config
        x_BLD = Patchify(c, name="patch")(pixels_BHWC)
        B, patches = x_BLD.shape[:2]
        token = self.param("token", nn.initializers.normal(0.02), (c.width,), c.param_dtype).astype(c.dtype)
        positions = self.param("positions", nn.initializers.normal(0.02), (1 + patches, c.width), c.param_dtype)
        x_BLD = jnp.concatenate([jnp.broadcast_to(token, (B, 1, c.width)), x_BLD], axis=1) + positions.astype(c.dtype)
        x_BLD = LayerNorm(EPS, c.dtype, c.param_dtype, name="norm_pre")(x_BLD)
        blocks = stack(Block, layers=c.layers, remat="none", broadcast=0)(c, name="blocks")
        (last_BLD, tokens_BLD), _ = blocks((x_BLD, x_BLD))
        last_BD = LayerNorm(EPS, c.dtype, c.param_dtype, name="norm_post")(last_BLD[:, 0])
        return Outputs(tokens_BLD, Linear(c.embedding, c.dtype, c.param_dtype, use_bias=False, name="head")(last_BD))


class Block(nn.Module):
    """Carries (x, x before this block), so that the one before the last is at hand when the stack ends."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, carry):
        c = self.config
        before_BLD = constrain(carry[0], "batch", None, None)
        h_BLD = LayerNorm(EPS, c.dtype, c.param_dtype, name="norm_attn")(before_BLD)
        q, k, v = (Linear(c.width, c.dtype, c.param_dtype, name=name)(h_BLD) for name in "qkv")
        q, k, v = (x.reshape(*x.shape[:2], c.heads, -1) for x in (q, k, v))
        h_BLD = attend(q, k, v).reshape(before_BLD.shape)
        x_BLD = before_BLD + Linear(c.width, c.dtype, c.param_dtype, name="o")(h_BLD)
        h_BLD = LayerNorm(EPS, c.dtype, c.param_dtype, name="norm_mlp")(x_BLD)
        h_BLE = gelu_erf(Linear(c.mlp, c.dtype, c.param_dtype, name="up")(h_BLD))
        return (x_BLD + Linear(c.width, c.dtype, c.param_dtype, name="down")(h_BLE), before_BLD), None


class Patchify(nn.Module):
    """(B, H, W, 3) -> (B, patches, D), row-major: a strided convolution without bias, as a product."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, pixels_BHWC):
        c = self.config
        B, side = pixels_BHWC.shape[0], c.image_size // c.patch
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (c.patch, c.patch, 3, c.width), c.param_dtype)
        x = pixels_BHWC.reshape(B, side, c.patch, side, c.patch, 3).swapaxes(2, 3)
        return matmul(x.reshape(B, side * side, -1), kernel.reshape(-1, c.width), c.dtype).astype(c.dtype)


def init(config: CLIPConfig, key) -> Params:
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.float32)
    return dict(CLIP(config).init(key, pixels)["params"])


def preprocess(image_BHWC: np.ndarray, config: CLIPConfig) -> np.ndarray:
    """RGB in [-1, 1] of any size -> pixels (B, image_size, image_size, 3) float32; the aspect ratio is not kept.

    The kernel is torch's bicubic one without antialiasing, overshoot is not clipped: the weights were tuned with that.
    """
    resized = image.resize_bicubic_torch(image_BHWC, config.image_size, config.image_size)
    return (resized * 0.5 + 0.5 - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)


def config_of(shapes: dict[str, tuple[int, ...]], released: dict) -> CLIPConfig:
    """The configuration of a checkpoint with these keys and shapes.

    released: {} for the published file; a "num_heads" in it is for towers whose heads are not 80 wide.
    """
    found = parameter_shapes(TORCH, shapes)
    patch, width = found["patch/kernel"][0], found["patch/kernel"][-1]
    if "num_heads" not in released and width % HEAD_WIDTH:
        raise ValueError(f"an image encoder of width {width} needs num_heads: heads of {HEAD_WIDTH} do not divide it")
    return CLIPConfig(
        width=width,
        heads=released.get("num_heads", width // HEAD_WIDTH),
        layers=found["blocks/up/kernel"][0],
        mlp=found["blocks/up/kernel"][-1],
        image_size=round((found["positions"][0] - 1) ** 0.5) * patch,
        patch=patch,
        embedding=found["head/kernel"][-1],
    )


AXES = {
    r"patch/kernel": (None, None, None, "embed"),
    r"token": (None,),
    r"positions": (None, None),
    r"norm_(pre|post)/(scale|bias)": (None,),
    r"blocks/norm_(attn|mlp)/(scale|bias)": ("layers", None),
    r"blocks/[qkv]/kernel": ("layers", "embed", "heads"),
    r"blocks/[qkv]/bias": ("layers", "heads"),
    r"blocks/o/kernel": ("layers", "heads", "embed"),
    r"blocks/(o|down)/bias": ("layers", None),
    r"blocks/up/kernel": ("layers", "embed", "mlp"),
    r"blocks/up/bias": ("layers", "mlp"),
    r"blocks/down/kernel": ("layers", "mlp", "embed"),
    r"head/kernel": ("embed", None),
}

TORCH = table(
    [
        Row("visual.patch_embedding.weight", "patch/kernel", "oihw->hwio"),
        Row("visual.cls_embedding", "token", "11d->d"),
        Row("visual.pos_embedding", "positions", "1nd->nd"),
        Row("visual.head", "head/kernel", "io->io"),
    ],
    norm("visual.pre_norm", "norm_pre", bias=True),
    norm("visual.transformer.{}.norm1", "blocks/norm_attn", bias=True),
    linear("visual.transformer.{}.attn.to_qkv", "blocks/{q,k,v}"),
    linear("visual.transformer.{}.attn.proj", "blocks/o"),
    norm("visual.transformer.{}.norm2", "blocks/norm_mlp", bias=True),
    linear("visual.transformer.{}.mlp.0", "blocks/up"),
    linear("visual.transformer.{}.mlp.2", "blocks/down"),
    norm("visual.post_norm", "norm_post", bias=True),
)

UNUSED = (r"textual\..*", r"log_scale")
