"""Whisper's encoder as a speech encoder: a 16 kHz recording comes in, one vector per 20 ms goes out.

Log-mel energies, two convolutions, sinusoidal positions and a pre-norm transformer (Radford et al. 2022, "Robust Speech
Recognition via Large-Scale Weak Supervision"). Reference: transformers' WhisperModel, whose keys are accepted with and
without their prefixes; the recogniser's other half is left out. Kling-Avatar and LongCat drive their lips with it.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import librosa
import numpy as np

from kavatar_jax.checkpoint.bridge import Row, conv, linear, norm, parameter_shapes, table
from kavatar_jax.config import SPEECH_TOKEN, WhisperConfig
from kavatar_jax.models.wav2vec2 import convolve
from kavatar_jax.nn.attention import attend
from kavatar_jax.nn.layers import LayerNorm, Linear, gelu_erf
from kavatar_jax.nn.stack import stack
from kavatar_jax.parallel.sharding import constrain
from kavatar_jax.types import SAMPLE_RATE, Params

EPS = 1e-5
HEAD_WIDTH = 64  # of every published model; only config.json carries it
HOP, WINDOW = 160, 400  # samples: 10 and 25 ms
LOWEST = 8.0  # powers of ten under the loudest energy of a recording, below which all is alike


class Whisper(nn.Module):
    """energies (B, 2 L, bands) of equally long recordings, as `log_mel` makes them -> (B, L, width)."""

    config: WhisperConfig

    @nn.compact
    def __call__(self, energies_BFC):
        c = self.config
        x_BLD = energies_BFC
        for name, stride in (("conv_1", 1), ("conv_2", 2)):
            x_BLD = Convolution(c, stride, name=name)(x_BLD)
        positions = self.param("positions", lambda key, *of: sinusoids(*of), (c.positions, c.width), c.param_dtype)
        x_BLD = x_BLD + positions[: x_BLD.shape[1]].astype(c.dtype)
        x_BLD, _ = stack(Block, layers=c.layers, remat="none", broadcast=0)(c, name="blocks")(x_BLD)
        return LayerNorm(EPS, c.dtype, c.param_dtype, name="norm")(x_BLD)


class Convolution(nn.Module):
    """Three taps over time, GELU."""

    config: WhisperConfig
    stride: int

    @nn.compact
    def __call__(self, x_BFC):
        c = self.config
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, x_BFC.shape[-1], c.width), c.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (c.width,), c.param_dtype).astype(jnp.float32)
        x_BFC = convolve(x_BFC, kernel, c.dtype, stride=self.stride, padding=(1, 1))
        return gelu_erf(x_BFC + bias).astype(c.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). Keys have no bias."""

    config: WhisperConfig

    @nn.compact
    def __call__(self, x_BLD):
        c = self.config
        x_BLD = constrain(x_BLD, "batch", None, None)
        h_BLD = LayerNorm(EPS, c.dtype, c.param_dtype, name="norm_attn")(x_BLD)
        q, k, v = (
            Linear(c.width, c.dtype, c.param_dtype, use_bias=name != "k", name=name)(h_BLD) for name in ("q", "k", "v")
        )
        q, k, v = (x.reshape(*x.shape[:2], c.heads, -1) for x in (q, k, v))
        x_BLD = x_BLD + Linear(c.width, c.dtype, c.param_dtype, name="o")(attend(q, k, v).reshape(x_BLD.shape))
        h_BLD = LayerNorm(EPS, c.dtype, c.param_dtype, name="norm_mlp")(x_BLD)
        h_BLE = gelu_erf(Linear(c.mlp, c.dtype, c.param_dtype, name="up")(h_BLD))
        return x_BLD + Linear(c.width, c.dtype, c.param_dtype, name="down")(h_BLE), None


def init(config: WhisperConfig, key) -> Params:
    return dict(Whisper(config).init(key, jnp.zeros((1, 2, config.bands), jnp.float32))["params"])


def listen(params: Params, samples_BS, config: WhisperConfig, *, lora: Params | None = None):
    """Recordings of equal length, in [-1, 1] -> (B, L, width) float32, less the vectors of config.memory. Vector i hears
    best its own 20 ms.

    ValueError of more than the encoder's positions; a `filled` encoder hears silence up to the last of them.
    """
    count = token_count(samples_BS.shape[1], config)
    if count > config.positions:
        raise ValueError(
            f"{count * SPEECH_TOKEN / SAMPLE_RATE:.1f} s of speech at once; this encoder has positions for "
            f"{config.positions * SPEECH_TOKEN / SAMPLE_RATE:.1f} s; use shorter windows"
        )
    length = (config.positions if config.filled else count) * SPEECH_TOKEN
    silence = max(0, length - samples_BS.shape[1])
    energies = log_mel(jnp.pad(samples_BS, ((0, 0), (0, silence)))[:, :length], config.bands)
    vectors = Whisper(config).apply({"params": params, "lora": lora or {}}, energies)
    return vectors[:, config.memory : count].astype(jnp.float32)


def log_mel(samples_BS, bands: int):
    """(B, S) -> (B, S / HOP, bands) float32: Slaney's bands from 0 to 8 kHz of a Hann window around every 10 ms, as
    logarithms not too far below the recording's loudest, moved to about [-1, 1]. S: a multiple of HOP above WINDOW / 2.
    """
    count = samples_BS.shape[1] // HOP
    padded = jnp.pad(samples_BS.astype(jnp.float32), ((0, 0), (WINDOW // 2, WINDOW // 2)), mode="reflect")
    padded = jnp.pad(padded, ((0, 0), (0, -padded.shape[1] % HOP)))
    steps = padded.reshape(padded.shape[0], -1, HOP)
    frames = jnp.concatenate([steps[:, i : i + count] for i in range(-(-WINDOW // HOP))], axis=-1)[..., :WINDOW]
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)
    energies = jnp.square(jnp.abs(jnp.fft.rfft(frames * hann, axis=-1))) @ _filters(bands)
    logarithms = jnp.log10(jnp.maximum(energies, 1e-10))
    loudest = logarithms.max(axis=(1, 2), keepdims=True)
    return (jnp.maximum(logarithms, loudest - LOWEST) + 4) / 4


def normalise(samples: np.ndarray) -> np.ndarray:
    """As they are: energies tell how loud a voice is."""
    return np.asarray(samples, np.float32)


def token_count(samples: int, config: WhisperConfig) -> int:
    return samples // SPEECH_TOKEN


def sinusoids(shape: tuple[int, int], dtype) -> jax.Array:
    """Sines, then cosines, of positions over wavelengths from 2 pi to 20,000 pi: (positions, width)."""
    positions, width = shape
    rates = np.exp(-np.log(10000) / (width // 2 - 1) * np.arange(width // 2))
    angles = np.arange(positions)[:, None] * rates
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype)


@functools.cache
def _filters(bands: int) -> np.ndarray:
    """(WINDOW / 2 + 1, bands)."""
    return librosa.filters.mel(sr=SAMPLE_RATE, n_fft=WINDOW, n_mels=bands).T.astype(np.float32)


def config_of(shapes: dict[str, tuple[int, ...]], released: dict) -> WhisperConfig:
    """The configuration of a checkpoint with these keys and shapes. released: its config.json, {} where there is none."""
    found = parameter_shapes(TORCH, shapes)
    positions, width = found["positions"]
    return WhisperConfig(
        width=width,
        heads=released.get("encoder_attention_heads", width // HEAD_WIDTH),
        layers=found["blocks/up/kernel"][0],
        mlp=found["blocks/up/kernel"][-1],
        bands=found["conv_1/kernel"][1],
        positions=positions,
    )


AXES = {
    r"conv_\d/kernel": (None, None, "embed"),
    r"conv_\d/bias": (None,),
    r"positions": (None, None),
    r"blocks/norm_(attn|mlp)/(scale|bias)": ("layers", None),
    r"blocks/[qkv]/kernel": ("layers", "embed", "heads"),
    r"blocks/[qv]/bias": ("layers", "heads"),
    r"blocks/o/kernel": ("layers", "heads", "embed"),
    r"blocks/(o|down)/bias": ("layers", None),
    r"blocks/up/kernel": ("layers", "embed", "mlp"),
    r"blocks/up/bias": ("layers", "mlp"),
    r"blocks/down/kernel": ("layers", "mlp", "embed"),
    r"norm/(scale|bias)": (None,),
}

_LAYER = "layers.{}"
_ROWS = table(
    conv("conv1", "conv_1", letters="k"),
    conv("conv2", "conv_2", letters="k"),
    [Row("embed_positions.weight", "positions", "nd->nd")],
    *(linear(f"{_LAYER}.self_attn.{n}_proj", f"blocks/{n[0]}", bias=n != "k") for n in ("q", "k", "v", "out")),
    norm(f"{_LAYER}.self_attn_layer_norm", "blocks/norm_attn", bias=True),
    linear(f"{_LAYER}.fc1", "blocks/up"),
    linear(f"{_LAYER}.fc2", "blocks/down"),
    norm(f"{_LAYER}.final_layer_norm", "blocks/norm_mlp", bias=True),
    norm("layer_norm", "norm", bias=True),
)
TORCH = [
    Row("|".join(prefix + row.key for prefix in ("model.encoder.", "encoder.", "")), row.path, row.layout)
    for row in _ROWS
]

UNUSED = (r"(model\.)?decoder\..*", r"proj_out\.weight")
