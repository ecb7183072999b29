"""The Wan2.1 diffusion transformer: noisy latents and conditions in, velocity out.

One class for the family. Plain Wan (T2V, I2V, FLF2V) and the audio-driven StableAvatar models, 1.3B and 14B, differ by
config alone. Source: Wan-Video/Wan2.1, wan/modules/model.py; Francis-Rings/StableAvatar,
wan/models/wan_fantasy_transformer3d_1B.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.checkpoint.bridge import Row, linear, norm, table
from kavatar_jax.config import AudioAdapterConfig, DiTConfig
from kavatar_jax.diffusion.flow import TRAIN_STEPS, velocity_towards
from kavatar_jax.models import audio_adapter, director_projection
from kavatar_jax.models.audio_adapter import ABSENT, AudioAdapter, AudioPack
from kavatar_jax.models.director_projection import DirectorProjection
from kavatar_jax.models.dit_layers import Head, ImageEmbedding, Patchify, Skip, TextEmbedding, TimeEmbedding
from kavatar_jax.nn.attention import attend
from kavatar_jax.nn.frames import tokens_to_heard
from kavatar_jax.nn.layers import (
    LayerNorm,
    Linear,
    RMSNorm,
    gelu_tanh,
    layer_norm,
)  # fmt: skip
from kavatar_jax.nn.rope import rope_table, rotate
from kavatar_jax.nn.stack import stack
from kavatar_jax.parallel.sharding import constrain
from kavatar_jax.types import Params

MASK_CHANNELS = 4  # of the condition, one for each video frame of a latent frame


class Inputs(NamedTuple):
    """One batch for the DiT; a field that the config does not use is None.

    latents: (B, T, H, W, 16) noisy; timestep: (B,) in [0, 1000]
    text: (B, text_length, text_width), zero rows after the last token, which are attended as in the release
    condition: (B, T, H, W, 20), 4 mask channels and 16 of the image latent; image: (B, 257 or 514, image_width)
    speech: (B, L, speech_width); slices: (B, T, A) into its rows; heard: (B,) bool, False zeroes the refined audio
    director: (B, L, director_width); frames: (B,) how many of the T latent frames are real, None for all
    audio_gain: (B,) what the blocks' attention to audio is multiplied by, None for one
    residual: (B, S, D) what the blocks added to the tokens at an earlier noise level; where it is given they are not run
    """

    latents: jax.Array
    timestep: jax.Array
    text: jax.Array
    condition: jax.Array | None = None
    image: jax.Array | None = None
    speech: jax.Array | None = None
    slices: jax.Array | None = None
    heard: jax.Array | None = None
    director: jax.Array | None = None
    frames: jax.Array | None = None
    audio_gain: jax.Array | None = None
    residual: jax.Array | None = None


class Context(NamedTuple):
    """What every block reads. audio: (B, T, A, D); audio_keys: (B, T, A) which of its places exist.

    pack: (B, T, D) what each latent frame hears, added to its tokens; audio_gain: (B,) or None.
    """

    modulation: jax.Array
    rope: tuple[jax.Array, jax.Array]
    text: jax.Array
    image: jax.Array | None
    audio: jax.Array | None
    audio_keys: jax.Array | None
    director: jax.Array | None
    pack: jax.Array | None = None
    audio_gain: jax.Array | None = None


class Outputs(NamedTuple):
    """velocity (B, T, H, W, 16) float32, and what led to it; jit drops the parts that nobody reads."""

    velocity: jax.Array
    tokens: jax.Array
    time: jax.Array
    context: Context
    last: jax.Array


class DiT(nn.Module):
    """clip_level: audio attention spans the whole window rather than each latent frame (used in training only)."""

    config: DiTConfig
    clip_level: bool = False

    @nn.compact
    def __call__(self, inputs: Inputs) -> Outputs:
        c, inputs = self.config, jax.tree.map(_clips_apart, inputs)
        grid = tuple(n // p for n, p in zip(inputs.latents.shape[1:4], c.patch, strict=True))
        condition = inputs.condition
        if c.reference == "every":
            assert condition is not None, "there is no condition that could show the reference"
            condition = show_reference(condition)
        tokens = Patchify(c, name="patch")(inputs.latents, condition)
        cos, sin = rope(grid, c)
        if inputs.frames is not None:  # past the end of a short window: zero tokens, not rotated, attended as released
            real = jnp.repeat(jnp.arange(grid[0]) < inputs.frames[:, None], grid[1] * grid[2], axis=1)[..., None]
            tokens, cos, sin = jnp.where(real, tokens, 0), jnp.where(real, cos, 1), jnp.where(real, sin, 0)

        time, modulation = TimeEmbedding(c, name="time")(inputs.timestep)
        audio = audio_keys = image = director = pack = None
        text = TextEmbedding(c, name="text")(inputs.text)
        if c.image_width is not None:
            image = ImageEmbedding(c, name="image")(inputs.image)
        if c.director_width is not None and inputs.director is not None:
            director = DirectorProjection(c, name="director")(inputs.director)
        if c.audio is not None:
            audio = AudioAdapter(c, name="audio")(inputs.speech, inputs.slices, tokens, time, modulation)
            audio = audio if inputs.heard is None else jnp.where(inputs.heard[:, None, None, None], audio, 0)
            audio_keys = inputs.slices != ABSENT
            if c.audio.pack:
                pack = AudioPack(c, name="pack")(inputs.speech, inputs.slices)
                pack = pack if inputs.heard is None else jnp.where(inputs.heard[:, None, None], pack, 0)
        time, modulation, text, image, audio, director, pack = jax.tree.map(
            _clips_apart, (time, modulation, text, image, audio, director, pack)
        )
        context = Context(modulation, (cos, sin), text, image, audio, audio_keys, director, pack, inputs.audio_gain)

        x = constrain(tokens.astype(c.dtype), "batch", "tokens", None)
        if inputs.residual is None:
            blocks = stack(Block, layers=c.layers, remat=c.remat, broadcast=1)(c, self.clip_level, name="blocks")
            x, _ = blocks(x, context)
        else:
            x = x + inputs.residual
        predicted = Head(c, name="head")(x, time, grid)
        if c.predicts != "velocity":
            noisy = inputs.latents.astype(jnp.float32)
            sigma = inputs.timestep.astype(jnp.float32)[:, None, None, None, None] / TRAIN_STEPS
            start = 0.0
            if c.predicts == "change":
                assert condition is not None, "there is nothing that could be changed"
                start = condition[..., MASK_CHANNELS:].astype(jnp.float32)
            if c.skip:
                predicted = predicted + Skip(c, name="skip")(x, time, grid) * (noisy - (1 - sigma) * start)
            predicted = velocity_towards(noisy, start + predicted, sigma)
        return Outputs(predicted, tokens, time, context, x)


class Block(nn.Module):
    config: DiTConfig
    clip_level: bool

    @nn.compact
    def __call__(self, x_BSD, context: Context):
        c = self.config
        table_6D = self.param("modulation", nn.initializers.normal(c.width**-0.5), (6, c.width), c.param_dtype)
        rows = jnp.split(table_6D.astype(jnp.float32) + context.modulation, 6, axis=1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = rows
        if context.pack is not None:
            x_BSD = x_BSD + self._hear(x_BSD, context.pack)

        h = (layer_norm(x_BSD, 1e-6) * (1 + scale) + shift).astype(c.dtype)
        h = SelfAttention(c, name="self_attn")(h, context.rope)
        x_BSD = (x_BSD + h * gate).astype(c.dtype)

        h = LayerNorm(1e-6, c.dtype, c.param_dtype, name="cross_norm")(x_BSD)
        x_BSD = x_BSD + CrossAttention(c, self.clip_level, name="cross_attn")(h, context)

        h = (layer_norm(x_BSD, 1e-6) * (1 + scale_mlp) + shift_mlp).astype(c.dtype)
        h = gelu_tanh(Linear(c.mlp, c.dtype, c.param_dtype, quantised=c.quantised, name="up")(h))
        h = constrain(h, "batch", "tokens", "mlp")
        h = Linear(c.width, c.dtype, c.param_dtype, quantised=c.quantised, name="down")(h)
        return constrain((x_BSD + h * gate_mlp).astype(c.dtype), "batch", "tokens", None), None

    def _hear(self, x_BSD, pack_BTD):
        c = self.config
        start = nn.initializers.zeros
        h = Linear(c.width, c.dtype, c.param_dtype, use_bias=False, init=start, name="hear")(pack_BTD)
        return jnp.repeat(h, x_BSD.shape[1] // pack_BTD.shape[1], axis=1)


class SelfAttention(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, x_BSD, rope_tables):
        c = self.config
        q, k, v = (Linear(c.width, c.dtype, c.param_dtype, quantised=c.quantised, name=name)(x_BSD) for name in "qkv")
        q, k = (RMSNorm(1e-6, c.dtype, c.param_dtype, name=f"norm_{name}")(x) for name, x in (("q", q), ("k", k)))
        q, k, v = (constrain(split_heads(x, c), "batch", "tokens", "heads", None) for x in (q, k, v))
        h = attend(rotate(q, *rope_tables), rotate(k, *rope_tables), v)
        return Linear(c.width, c.dtype, c.param_dtype, quantised=c.quantised, name="o")(h.reshape(x_BSD.shape))


class CrossAttention(nn.Module):
    """One query, an attention of its own for each kind of context, summed before one output projection."""

    config: DiTConfig
    clip_level: bool

    @nn.compact
    def __call__(self, x_BSD, context: Context):
        c = self.config

        def project(name, norm=None):
            start = nn.initializers.zeros if name == "v_audio" else nn.initializers.lecun_normal()
            linear = Linear(c.width, c.dtype, c.param_dtype, init=start, quantised=c.quantised, name=name)
            scale = RMSNorm(1e-6, c.dtype, c.param_dtype, name=norm) if norm else lambda h: h
            return lambda source: scale(linear(source))

        q_BSD = project("q", "norm_q")(x_BSD)
        q = split_heads(q_BSD, c)
        key, value = project("k", "norm_k"), project("v")

        def attend_to(source, key, value):
            return attend(q, split_heads(key(source), c), split_heads(value(source), c))

        h = attend_to(context.text, key, value)
        if (
            context.director is not None
        ):  # words of another kind: the text's keys and values, a gate that starts at zero
            gate = self.param("director_gate", nn.initializers.zeros, (c.heads, 1), c.param_dtype)
            h = h + attend_to(context.director, key, value) * jnp.tanh(gate).astype(c.dtype)
        if context.image is not None:
            h = h + attend_to(context.image, project("k_image", "norm_k_image"), project("v_image"))
        h = h.reshape(x_BSD.shape)
        if context.audio is not None:  # no norm on these keys, as released
            heard = self._listen(q, project("k_audio")(context.audio), project("v_audio")(context.audio), context)
            heard = heard.reshape(x_BSD.shape)
            if context.audio_gain is not None:  # scaling the values would be the same
                heard = (heard * context.audio_gain[:, None, None]).astype(c.dtype)
            h = h + heard
        return Linear(c.width, c.dtype, c.param_dtype, quantised=c.quantised, name="o")(h)

    def _listen(self, q_BSNK, k_BTAD, v_BTAD, context: Context):
        """Each latent frame hears its own slice; at clip level everything hears everything."""
        assert context.audio_keys is not None
        B, T = k_BTAD.shape[:2]
        frames = 1 if self.clip_level else T
        k, v = (x.reshape(B, frames, -1, *q_BSNK.shape[2:]) for x in (k_BTAD, v_BTAD))
        return tokens_to_heard(q_BSNK, k, v, context.audio_keys.reshape(B, frames, -1))


def show_reference(condition_BTHWC):
    """The first frame's latents in place of those of frames that are not given; the mask stays as it is."""
    mask, latents = condition_BTHWC[..., :MASK_CHANNELS], condition_BTHWC[..., MASK_CHANNELS:]
    given = (mask > 0).any(axis=-1, keepdims=True)
    return jnp.concatenate([mask, jnp.where(given, latents, latents[:, :1])], axis=-1)


def frames_held(config: DiTConfig) -> int:
    """How many frames of the condition, up to and with it, show a later frame that is given.

    One, as in the release, whose latent is then that of a picture among grey; where the reference is shown in every
    frame, all of its latent's, which is then that of a still.
    """
    return MASK_CHANNELS if config.reference == "every" else 1


def _clips_apart(x):
    """Spread over the batch alone. Left to the compiler, what is multiplied by a kernel in parts over fsdp is cut like the
    kernel, and summed or gathered in every block; it is the kernels that are to be gathered."""
    return constrain(x, "batch", *(None,) * (x.ndim - 1))


def split_heads(x_BSD, config: DiTConfig):
    return x_BSD.reshape(*x_BSD.shape[:2], config.heads, -1)


def rope(grid: tuple[int, ...], config: DiTConfig):
    """Cosine and sine of every token's angles, (1, S, K/2) float32, made in float64."""
    angles = rope_table(*grid, head=config.width // config.heads)[None]
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def init(config: DiTConfig, key) -> Params:
    """Fresh parameters; the audio values of the blocks start at zero, so that speech changes nothing yet.

    StableAvatar's keys start at zero too, which changes no more, and hears the mean of a slice until they have grown.
    """
    c, a = config, config.audio
    t, h, w = c.patch

    def zeros(*shape, dtype=jnp.float32):
        return jnp.zeros(shape, dtype)

    inputs = Inputs(
        latents=zeros(1, t, h, w, c.out_channels),
        timestep=zeros(1),
        text=zeros(1, c.text_length, c.text_width),
        condition=zeros(1, t, h, w, c.in_channels - c.out_channels) if c.in_channels > c.out_channels else None,
        image=zeros(1, c.image_positions or 1, c.image_width) if c.image_width is not None else None,
        speech=zeros(1, 1, a.speech_width) if a else None,
        slices=zeros(1, 1, 1, dtype=jnp.int32) if a else None,
        director=zeros(1, 1, c.director_width) if c.director_width is not None else None,
    )
    return dict(DiT(c).init(key, inputs)["params"])


def config_of(shapes: dict[str, tuple[int, ...]], released: dict) -> DiTConfig:
    """The config of a reference state dict; only the number of heads cannot be read off the shapes."""
    width, in_channels, *patch = shapes["patch_embedding.weight"]
    layers = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
    projections = [
        shapes[f"vocal_projector.proj_model.{name}.weight"]
        for name in ("proj", "proj_1", "proj_2")
        if f"vocal_projector.proj_model.{name}.weight" in shapes
    ]
    audio = None
    if projections:
        audio = AudioAdapterConfig(
            speech_width=projections[0][1],
            projection=tuple(shape[0] for shape in projections),
            heads=8,
            mlp=shapes["vocal_projector.blocks.0.ffn.0.weight"][0],
            layers=sum(key.startswith("vocal_projector.blocks.") and key.endswith(".modulation") for key in shapes),
        )
    image = "img_emb.proj.1.weight" in shapes
    return DiTConfig(
        width=width,
        heads=released["num_heads"],
        layers=layers,
        mlp=shapes["blocks.0.ffn.0.weight"][0],
        in_channels=in_channels,
        out_channels=shapes["head.head.weight"][0] // int(np.prod(patch)),
        time_width=shapes["time_embedding.0.weight"][1],
        text_width=shapes["text_embedding.0.weight"][1],
        text_length=released.get("text_len", 512),
        image_width=shapes["img_emb.proj.1.weight"][1] if image else None,
        image_positions=shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else 0,
        audio=audio,
        patch=(patch[0], patch[1], patch[2]),
    )


AXES = {
    r"patch/kernel": (None, None, None, None, "embed"),
    r"(patch|time/in|time/out|text/in|text/out|image/in|image/out)/bias": (None,),
    r"(time|text)/(in|out)/kernel": (None, "embed"),
    r"time/modulation/kernel": ("embed", None),
    r"time/modulation/bias": (None,),
    r"image/positions": (None, None),
    r"image/norm_(in|out)/(scale|bias)": (None,),
    r"image/(in|out)/kernel": (None, "embed"),
    r"blocks/modulation": ("layers", None, None),
    r"blocks/cross_norm/(scale|bias)": ("layers", None),
    r"blocks/(self|cross)_attn/norm_\w+/scale": ("layers", None),
    r"blocks/(self|cross)_attn/[qkv](_image|_audio)?/kernel": ("layers", "embed", "heads"),
    r"blocks/(self|cross)_attn/[qkv](_image|_audio)?/bias": ("layers", "heads"),
    r"blocks/(self|cross)_attn/o/kernel": ("layers", "heads", "embed"),
    r"blocks/(self|cross)_attn/o/bias": ("layers", None),
    r"blocks/cross_attn/director_gate": ("layers", None, None),
    r"blocks/up/kernel": ("layers", "embed", "mlp"),
    r"blocks/up/bias": ("layers", "mlp"),
    r"blocks/down/kernel": ("layers", "mlp", "embed"),
    r"blocks/down/bias": ("layers", None),
    r"blocks/hear/kernel": ("layers", "embed", None),
    r"pack/in/kernel": (None, "embed"),
    r"pack/out/kernel": ("embed", None),
    r"skip/(time|token)/kernel": ("embed", None),
    r"skip/time/bias": (None,),
    r"head/modulation": (None, None),
    r"head/out/kernel": ("embed", None),
    r"head/out/bias": (None,),
    **{f"audio/{path}": axes for path, axes in audio_adapter.AXES.items()},
    **{f"director/{path}": axes for path, axes in director_projection.AXES.items()},
}

# the director's projection has no counterpart in any released checkpoint
TORCH = table(
    [Row("patch_embedding.weight", "patch/kernel", "oithw->thwio"), Row("patch_embedding.bias", "patch/bias", "d->d")],
    linear("text_embedding.0", "text/in"),
    linear("text_embedding.2", "text/out"),
    linear("time_embedding.0", "time/in"),
    linear("time_embedding.2", "time/out"),
    linear("time_projection.1", "time/modulation"),
    [Row("img_emb.emb_pos", "image/positions", "1nd->nd")],
    norm("img_emb.proj.0", "image/norm_in", bias=True),
    linear("img_emb.proj.1", "image/in"),
    linear("img_emb.proj.3", "image/out"),
    norm("img_emb.proj.4", "image/norm_out", bias=True),
    [Row("blocks.{}.modulation", "blocks/modulation", "1nd->nd")],
    *(linear(f"blocks.{{}}.self_attn.{name}", f"blocks/self_attn/{name}") for name in "qkvo"),
    *(norm(f"blocks.{{}}.self_attn.norm_{name}", f"blocks/self_attn/norm_{name}") for name in "qk"),
    norm("blocks.{}.norm3", "blocks/cross_norm", bias=True),
    *(linear(f"blocks.{{}}.cross_attn.{name}", f"blocks/cross_attn/{name}") for name in "qkvo"),
    *(norm(f"blocks.{{}}.cross_attn.norm_{name}", f"blocks/cross_attn/norm_{name}") for name in "qk"),
    *(linear(f"blocks.{{}}.cross_attn.{name}_img", f"blocks/cross_attn/{name}_image") for name in "kv"),
    norm("blocks.{}.cross_attn.norm_k_img", "blocks/cross_attn/norm_k_image"),
    *(linear(f"blocks.{{}}.cross_attn.{name}_vocal", f"blocks/cross_attn/{name}_audio") for name in "kv"),
    linear("blocks.{}.ffn.0", "blocks/up"),
    linear("blocks.{}.ffn.2", "blocks/down"),
    [Row("head.modulation", "head/modulation", "1nd->nd")],
    linear("head.head", "head/out"),
    [
        Row("|".join(f"vocal_projector.{key}" for key in row.key.split("|")), f"audio/{row.path}", row.layout)
        for row in audio_adapter.TORCH
    ],
)

UNUSED: tuple[str, ...] = ()
