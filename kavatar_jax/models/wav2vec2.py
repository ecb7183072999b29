"""wav2vec 2.0, the speech encoder: a normalised 16 kHz recording comes in, one vector per 20 ms goes out.

Strided convolutions, a grouped positional convolution and a transformer (Baevski et al. 2020), in the two published
kinds: base, normed in the first convolution and after each sublayer, and stable (the large models), normed in every
convolution and before each sublayer. Reference: transformers' Wav2Vec2Model; its keys with and without their prefix and
both names of weight normalisation are accepted.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.checkpoint.bridge import Row, linear, norm, parameter_shapes, table
from kavatar_jax.config import Wav2Vec2Config
from kavatar_jax.nn.attention import attend
from kavatar_jax.nn.layers import LayerNorm, Linear, gelu_erf, layer_norm
from kavatar_jax.nn.stack import stack
from kavatar_jax.parallel.sharding import constrain
from kavatar_jax.types import Params

EPS = 1e-5
HEAD_WIDTH = 64  # of every published model; only config.json carries it
STRIDES = (5, 2, 2, 2, 2, 2, 2)  # likewise
CONVOLUTIONS = len(STRIDES)


class Outputs(NamedTuple):
    """last: (B, A, D) of the last layer, of a stable model its final norm.

    hidden: (layers + 1, B, A, D), the transformer's input first, `last` last
    features: (B, A, last conv width) of the convolutions, after their layer norm
    """

    last: jax.Array
    hidden: jax.Array
    features: jax.Array


class Wav2Vec2(nn.Module):
    """samples (B, S) of equally long recordings, each normalised by `normalise` -> Outputs."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, samples_BS) -> Outputs:
        c = self.config
        x_BAC = samples_BS[..., None]
        for layer in range(len(c.conv_widths)):
            x_BAC = Convolution(c, layer, name=f"conv_{layer}")(x_BAC)
        features_BAC = LayerNorm(EPS, c.dtype, c.param_dtype, name="norm_features")(x_BAC)
        x_BAD = Linear(c.width, c.dtype, c.param_dtype, name="project")(features_BAC)
        x_BAD = x_BAD + PositionalConvolution(c, name="positions")(x_BAD)
        norm_encoder = LayerNorm(EPS, c.dtype, c.param_dtype, name="norm_encoder")
        x_BAD = x_BAD if c.stable else norm_encoder(x_BAD)
        last_BAD, layers_KBAD = stack(Block, layers=c.layers, remat="none", broadcast=0)(c, name="blocks")(x_BAD)
        last_BAD = norm_encoder(last_BAD) if c.stable else last_BAD
        hidden_KBAD = jnp.concatenate([x_BAD[None], layers_KBAD[:-1], last_BAD[None]])
        return Outputs(last_BAD, hidden_KBAD, features_BAC)


class Convolution(nn.Module):
    """One strided convolution without padding, its norm where it has one, GELU."""

    config: Wav2Vec2Config
    layer: int

    @nn.compact
    def __call__(self, x_BAC):
        c, width = self.config, self.config.conv_widths[self.layer]
        shape = (c.conv_kernels[self.layer], x_BAC.shape[-1], width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, c.param_dtype)
        x_BAC = convolve(x_BAC, kernel, c.dtype, stride=c.conv_strides[self.layer])
        if c.conv_bias:
            x_BAC = x_BAC + self.param("bias", nn.initializers.zeros, (width,), c.param_dtype).astype(jnp.float32)
        if c.stable:
            x_BAC = LayerNorm(EPS, "float32", c.param_dtype, name="norm")(x_BAC)
        elif self.layer == 0:
            x_BAC = TimeNorm(c, name="norm")(x_BAC)
        return gelu_erf(x_BAC).astype(c.dtype)


class TimeNorm(nn.Module):
    """Each channel normed over time, float32: a group norm with as many groups as channels."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x_BAC):
        scale = self.param("scale", nn.initializers.ones, (x_BAC.shape[-1],), self.config.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x_BAC.shape[-1],), self.config.param_dtype)
        return layer_norm(x_BAC.swapaxes(1, 2), EPS).swapaxes(1, 2) * scale + bias


class PositionalConvolution(nn.Module):
    """A grouped convolution over time, then GELU. Its kernel is v / |v| * g, one length g for each tap."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x_BAD):
        c = self.config
        taps = c.position_kernel
        shape = (taps, c.width // c.position_groups, c.width)
        g_K = self.param("g", nn.initializers.ones, (taps,), c.param_dtype).astype(jnp.float32)
        v_KIO = self.param("v", nn.initializers.he_normal(), shape, c.param_dtype).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c.width,), c.param_dtype).astype(jnp.float32)
        kernel = v_KIO * (g_K * jax.lax.rsqrt(jnp.square(v_KIO).sum(axis=(1, 2))))[:, None, None]
        padding = (taps // 2, (taps - 1) // 2)
        x_BAD = convolve(x_BAD, kernel, c.dtype, padding=padding, groups=c.position_groups)
        return gelu_erf(x_BAD + bias).astype(c.dtype)


class Block(nn.Module):
    """Self-attention and feed-forward, each normed before (stable) or after its residual. Outputs what it carries."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x_BAD):
        c = self.config
        x_BAD = constrain(x_BAD, "batch", None, None)
        norms = [LayerNorm(EPS, c.dtype, c.param_dtype, name=name) for name in ("norm_attn", "norm_mlp")]
        for norm_block, sublayer in zip(norms, (self._attention, self._feed_forward), strict=True):
            x_BAD = x_BAD + sublayer(norm_block(x_BAD)) if c.stable else norm_block(x_BAD + sublayer(x_BAD))
        return x_BAD, x_BAD

    def _attention(self, x_BAD):
        c = self.config
        q, k, v = (Linear(c.width, c.dtype, c.param_dtype, name=name)(x_BAD) for name in "qkv")
        q, k, v = (x.reshape(*x.shape[:2], c.heads, -1) for x in (q, k, v))
        return Linear(c.width, c.dtype, c.param_dtype, name="o")(attend(q, k, v).reshape(x_BAD.shape))

    def _feed_forward(self, x_BAD):
        c = self.config
        h_BAE = gelu_erf(Linear(c.mlp, c.dtype, c.param_dtype, name="up")(x_BAD))
        return Linear(c.width, c.dtype, c.param_dtype, name="down")(h_BAE)


def convolve(x_BAC, kernel, dtype, *, stride=1, padding=(0, 0), groups=1):
    """Convolution over time, kernel (taps, in / groups, out), in `dtype`, accumulated and returned in float32."""
    return jax.lax.conv_general_dilated(
        x_BAC.astype(dtype),
        kernel.astype(dtype),
        (stride,),
        (padding,),
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=groups,
        preferred_element_type=jnp.float32,
    )


def init(config: Wav2Vec2Config, key) -> Params:
    samples_BS = jnp.zeros((1, receptive_field(config)), jnp.float32)
    return dict(Wav2Vec2(config).init(key, samples_BS)["params"])


def listen(params: Params, samples_BS, config: Wav2Vec2Config, *, lora: Params | None = None):
    """Normalised recordings of equal length -> (B, L, width) float32, without the vectors of config.memory."""
    vectors = Wav2Vec2(config).apply({"params": params, "lora": lora or {}}, samples_BS).last
    return vectors[:, config.memory :].astype(jnp.float32)


def normalise(samples: np.ndarray) -> np.ndarray:
    """Each recording (..., S) to zero mean and unit variance: (x - mean) / sqrt(variance + 1e-7), float32."""
    x = np.asarray(samples, np.float64)
    x = x - x.mean(axis=-1, keepdims=True)
    return (x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-7)).astype(np.float32)


def token_count(samples: int, config: Wav2Vec2Config) -> int:
    """How many vectors come of this many samples; 0 of fewer than the receptive field, 400 in all published models."""
    for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True):
        samples = max(0, (samples - kernel) // stride + 1)
    return samples


def receptive_field(config: Wav2Vec2Config) -> int:
    """How many samples one vector is made of."""
    samples = 1
    for kernel, stride in reversed(list(zip(config.conv_kernels, config.conv_strides, strict=True))):
        samples = (samples - 1) * stride + kernel
    return samples


def config_of(shapes: dict[str, tuple[int, ...]], released: dict) -> Wav2Vec2Config:
    """The configuration of a checkpoint with these keys and shapes. released: its config.json, {} where there is none.

    ValueError if config.json describes a variant that is neither of the two kinds.
    """
    found = parameter_shapes(TORCH, shapes)
    convolutions = [found[f"conv_{layer}/kernel"] for layer in range(CONVOLUTIONS)]
    width, position_kernel = found["positions/v"][-1], found["positions/v"][0]
    stable = "conv_1/norm/scale" in found
    _refuse_other_kinds(released, stable)
    return Wav2Vec2Config(
        width=width,
        heads=released.get("num_attention_heads", width // HEAD_WIDTH),
        layers=found["blocks/up/kernel"][0],
        mlp=found["blocks/up/kernel"][-1],
        conv_widths=tuple(shape[-1] for shape in convolutions),
        conv_kernels=tuple(shape[0] for shape in convolutions),
        conv_strides=tuple(released.get("conv_stride", STRIDES)),
        position_kernel=position_kernel,
        position_groups=width // found["positions/v"][1],
        stable=stable,
        conv_bias="conv_0/bias" in found,
    )


def _refuse_other_kinds(released: dict, stable: bool):
    kind = {"do_stable_layer_norm": stable, "feat_extract_norm": "layer" if stable else "group", "layer_norm_eps": EPS}
    kind |= {"hidden_act": "gelu", "feat_extract_activation": "gelu", "add_adapter": False}
    odd = [
        f"{name} {released[name]!r} (not {kind[name]!r})"
        for name in kind
        if released.get(name) not in (None, kind[name])
    ]
    if odd:
        raise ValueError(f"this speech encoder is neither a base nor a stable wav2vec 2.0: {', '.join(odd)}")


AXES = {
    r"conv_\d/kernel": (None, None, None),
    r"conv_\d/bias": (None,),
    r"conv_\d/norm/(scale|bias)": (None,),
    r"norm_(features|encoder)/(scale|bias)": (None,),
    r"project/kernel": (None, "embed"),
    r"project/bias": (None,),
    r"positions/(g|bias)": (None,),
    r"positions/v": (None, None, "embed"),
    r"blocks/norm_(attn|mlp)/(scale|bias)": ("layers", None),
    r"blocks/[qkv]/kernel": ("layers", "embed", "heads"),
    r"blocks/[qkv]/bias": ("layers", "heads"),
    r"blocks/o/kernel": ("layers", "heads", "embed"),
    r"blocks/(o|down)/bias": ("layers", None),
    r"blocks/up/kernel": ("layers", "embed", "mlp"),
    r"blocks/up/bias": ("layers", "mlp"),
    r"blocks/down/kernel": ("layers", "mlp", "embed"),
}

_CONV = "feature_extractor.conv_layers"
_POSITIONS = "encoder.pos_conv_embed.conv"
_BLOCK = "encoder.layers.{}"
_ROWS = table(
    *(
        [
            Row(f"{_CONV}.{layer}.conv.weight", f"conv_{layer}/kernel", "oik->kio"),
            Row(f"{_CONV}.{layer}.conv.bias", f"conv_{layer}/bias", "d->d"),
            *norm(f"{_CONV}.{layer}.layer_norm", f"conv_{layer}/norm", bias=True),
        ]
        for layer in range(CONVOLUTIONS)
    ),
    norm("feature_projection.layer_norm", "norm_features", bias=True),
    linear("feature_projection.projection", "project"),
    [
        Row(f"{_POSITIONS}.weight_g|{_POSITIONS}.parametrizations.weight.original0", "positions/g", "11k->k"),
        Row(f"{_POSITIONS}.weight_v|{_POSITIONS}.parametrizations.weight.original1", "positions/v", "oik->kio"),
        Row(f"{_POSITIONS}.bias", "positions/bias", "d->d"),
    ],
    norm("encoder.layer_norm", "norm_encoder", bias=True),
    *(linear(f"{_BLOCK}.attention.{name}_proj", f"blocks/{name[0]}") for name in ("q", "k", "v", "out")),
    norm(f"{_BLOCK}.layer_norm", "blocks/norm_attn", bias=True),
    linear(f"{_BLOCK}.feed_forward.intermediate_dense", "blocks/up"),
    linear(f"{_BLOCK}.feed_forward.output_dense", "blocks/down"),
    norm(f"{_BLOCK}.final_layer_norm", "blocks/norm_mlp", bias=True),
)
TORCH = [
    Row("|".join(prefix + key for prefix in ("wav2vec2.", "") for key in row.key.split("|")), row.path, row.layout)
    for row in _ROWS
]

UNUSED = (  # of pretraining, of masking while training, of a speech recogniser
    r"(wav2vec2\.)?masked_spec_embed",
    r"quantizer\..*",
    r"project_(q|hid)\..*",
    r"lm_head\..*",
)
