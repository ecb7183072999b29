"""StableAvatar's timestep-aware audio adapter: speech features in, audio tokens of every latent frame out.

Speech is projected token by token, cut into one slice per latent frame, and refined twice by looking at the noisy latent
tokens of that same frame under the timestep's modulation. Source: Francis-Rings/StableAvatar,
wan/models/vocal_projector_fantasy_1B.py and _14B.py; arXiv 2508.08248, section 3.1.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from kavatar_jax.checkpoint.bridge import Row, linear, norm, table
from kavatar_jax.config import DiTConfig
from kavatar_jax.nn.frames import heard_to_tokens
from kavatar_jax.nn.layers import LayerNorm, Linear, RMSNorm, gelu_tanh, layer_norm
from kavatar_jax.nn.stack import stack
from kavatar_jax.parallel.sharding import constrain

SILENCE = -1  # a place of a slice that is filled with a zero row, and attended
ABSENT = -2  # a place that does not exist in this slice: masked
NEIGHBOURS = 4  # speech tokens added on either side of a slice


class AudioAdapter(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, speech_BLD, slices_BTA, tokens_BSD, time_BD, modulation_B6D):
        """Audio tokens (B, T, A, D) float32.

        speech_BLD: (B, L, speech_width) features; slices_BTA: row of `speech_BLD` for each place, or SILENCE or ABSENT
        tokens_BSD: patch-embedded latents; time_BD, modulation_B6D: the DiT's timestep embedding and its projection
        """
        c, a = self.config, self.config.audio
        assert a is not None
        x = speech_BLD
        for i, width in enumerate(a.projection):
            x = Linear(width, c.dtype, c.param_dtype, use_bias=False, name=f"proj_{i}")(x)
            x = LayerNorm(1e-5, "float32", c.param_dtype, name=f"norm_{i}")(x)
        x_BTAD = gather_slices(x, slices_BTA)
        x_BTAD = constrain(x_BTAD, "batch", None, None, None)

        if a.layers:
            blocks = stack(AdapterBlock, layers=a.layers, remat=c.remat, broadcast=2)(c, name="blocks")
            x_BTAD, _ = blocks(x_BTAD, tokens_BSD, modulation_B6D)

        x_BTAD = layer_norm(x_BTAD, 1e-6)
        if a.modulated:
            shift, scale = _modulation(self, "head_modulation", 2, c, time_BD[:, None])
            x_BTAD = x_BTAD * (1 + scale) + shift
        return Linear(c.width, c.dtype, c.param_dtype, name="head")(x_BTAD).astype(jnp.float32)


class AudioPack(nn.Module):
    """All that a latent frame hears as one vector: (B, L, speech_width) and slices (B, T, A) -> (B, T, D) float32.

    Zero where everything is silent. Source: the audio pack of OmniAvatar, arXiv 2506.18866, section 3.2.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, speech_BLD, slices_BTA):
        c, a = self.config, self.config.audio
        assert a is not None
        B, T, count = slices_BTA.shape
        if count > a.pack:
            raise ValueError(f"slices have {count} speech tokens, and audio.pack is {a.pack}; use a higher frame rate")
        before = (a.pack - count) // 2  # a shorter slice keeps its middle where it is
        around = ((0, 0), (0, 0), (before, a.pack - count - before), (0, 0))
        heard = jnp.pad(gather_slices(speech_BLD, slices_BTA), around).reshape(B, T, -1)
        h = nn.silu(Linear(c.width, c.dtype, c.param_dtype, use_bias=False, name="in")(heard))
        return Linear(c.width, c.dtype, c.param_dtype, use_bias=False, name="out")(h).astype(jnp.float32)


class AdapterBlock(nn.Module):
    """Modulated norm as its own branch, attention to the latent tokens of the same frame, feed-forward; x is float32."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BTAD, tokens_BSD, modulation_B6D):
        c, a = self.config, self.config.audio
        assert a is not None
        shift_mlp, scale_mlp, gate_mlp = 0, 0, 1
        if a.modulated:
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _modulation(self, "modulation", 6, c, modulation_B6D)
            x_BTAD = x_BTAD + (layer_norm(x_BTAD, 1e-6) * (1 + scale) + shift) * gate
        if a.looking:
            x_BTAD = x_BTAD + self._look(x_BTAD, tokens_BSD)

        h = (layer_norm(x_BTAD, 1e-6) * (1 + scale_mlp) + shift_mlp).astype(c.dtype)
        h = gelu_tanh(Linear(a.mlp, c.dtype, c.param_dtype, name="up")(h))
        return x_BTAD + Linear(c.width, c.dtype, c.param_dtype, name="down")(h) * gate_mlp, None

    def _look(self, x_BTAD, tokens_BSD):
        c, a = self.config, self.config.audio
        assert a is not None
        h = LayerNorm(1e-6, c.dtype, c.param_dtype, name="cross_norm")(x_BTAD)
        q = RMSNorm(1e-6, c.dtype, c.param_dtype, name="norm_q")(Linear(c.width, c.dtype, c.param_dtype, name="q")(h))
        k = Linear(c.width, c.dtype, c.param_dtype, name="k")(tokens_BSD)
        k = RMSNorm(1e-6, c.dtype, c.param_dtype, name="norm_k")(k)
        v = Linear(c.width, c.dtype, c.param_dtype, name="v")(tokens_BSD)
        q, k, v = (x.reshape(*x.shape[:-1], a.heads, -1) for x in (q, k, v))
        h = heard_to_tokens(q, k, v).reshape(x_BTAD.shape)
        return Linear(c.width, c.dtype, c.param_dtype, name="o")(h)


def gather_slices(x_BLD, slices_BTA):
    """Rows of x for every place of every slice; zero rows where there is none: (B, T, A, D)."""
    B, T, A = slices_BTA.shape
    rows = jnp.take_along_axis(x_BLD, jnp.maximum(slices_BTA, 0).reshape(B, T * A, 1), axis=1)
    return jnp.where((slices_BTA >= 0)[..., None], rows.reshape(B, T, A, -1), 0)


def slice_spans(tokens: int, frames: int) -> np.ndarray:
    """First and last speech token, inclusive, that each latent frame would hear: (T, 2), running over at both ends.

    The released geometry for `frames` = 4n+1 video frames: a centre per latent frame, as wide as four frames, widened
    by four tokens on either side.
    """
    ratio = tokens / frames
    half = int(4 * ratio / 2)
    centres = [int((ratio * (4 * (i - 1) + 1) + ratio * (4 * i + 1)) / 2) - 1 for i in range(1, (frames - 1) // 4 + 1)]
    spans = [(centre - half, centre + half) for centre in centres]
    first_end = spans[0][0] if spans else half
    spans.insert(0, (first_end - 2 * half, first_end))
    return np.array(spans) + (-NEIGHBOURS, NEIGHBOURS)


def slice_table(tokens: int, frames: int) -> np.ndarray:
    """Which speech tokens each latent frame hears: (T, A) int32 rows of `tokens`, SILENCE in the places of those it lacks.

    The release puts these last, which its attention cannot tell.
    """
    spans = slice_spans(tokens, frames)
    rows = spans[:, :1] + np.arange(spans[0, 1] - spans[0, 0] + 1)
    return np.where((rows >= 0) & (rows < tokens), rows, SILENCE).astype(np.int32)


def _modulation(module: nn.Module, name: str, count: int, config: DiTConfig, time_BnD):
    """A learned table added to the timestep's: `count` rows (B, 1, 1, D), float32."""
    table_nD = module.param(name, nn.initializers.normal(config.width**-0.5), (count, config.width), config.param_dtype)
    return [row[:, :, None] for row in jnp.split(table_nD.astype(jnp.float32) + time_BnD, count, axis=1)]


AXES = {
    r"proj_\d/kernel": (None, "embed"),
    r"norm_\d/(scale|bias)": (None,),
    r"blocks/modulation": ("layers", None, None),
    r"blocks/cross_norm/(scale|bias)": ("layers", None),
    r"blocks/norm_(q|k)/scale": ("layers", None),
    r"blocks/(q|k|v)/kernel": ("layers", "embed", "heads"),
    r"blocks/(q|k|v)/bias": ("layers", "heads"),
    r"blocks/o/kernel": ("layers", "heads", "embed"),
    r"blocks/up/kernel": ("layers", "embed", "mlp"),
    r"blocks/up/bias": ("layers", "mlp"),
    r"blocks/down/kernel": ("layers", "mlp", "embed"),
    r"blocks/(o|down)/bias": ("layers", None),
    r"head_modulation": (None, None),
    r"head/kernel": ("embed", None),
    r"head/bias": (None,),
}

# one input linear in the 1.3B release, two in the 14B class
TORCH = table(
    [Row("proj_model.proj.weight|proj_model.proj_1.weight", "proj_0/kernel", "oi->io")],
    [Row("proj_model.norm.weight|proj_model.norm_1.weight", "norm_0/scale", "d->d")],
    [Row("proj_model.norm.bias|proj_model.norm_1.bias", "norm_0/bias", "d->d")],
    [Row("proj_model.proj_2.weight", "proj_1/kernel", "oi->io")],
    norm("proj_model.norm_2", "norm_1", bias=True),
    [Row("blocks.{}.modulation", "blocks/modulation", "1nd->nd")],
    norm("blocks.{}.norm3", "blocks/cross_norm", bias=True),
    *(linear(f"blocks.{{}}.cross_attn.{name}", f"blocks/{name}") for name in "qkvo"),
    norm("blocks.{}.cross_attn.norm_q", "blocks/norm_q"),
    norm("blocks.{}.cross_attn.norm_k", "blocks/norm_k"),
    linear("blocks.{}.ffn.0", "blocks/up"),
    linear("blocks.{}.ffn.2", "blocks/down"),
    [Row("final_head.modulation", "head_modulation", "1nd->nd")],
    linear("final_head.final_proj", "head"),
)
