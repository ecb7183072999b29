"""What other programs call the networks' tensors and sizes: the releases, diffusers, transformers.

A `Names` goes both ways: a file's shapes and its config.json become our config, and our config becomes a config.json.
Sources: diffusers' WanTransformer3DModel and AutoencoderKLWan; transformers' UMT5EncoderModel,
CLIPVisionModelWithProjection, Wav2Vec2Model and WhisperModel; the config.json of Wan-AI/Wan2.1-T2V-1.3B.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from kavatar_jax.checkpoint.bridge import Row, Shape, linear, norm, parameter_shapes, reference_shapes, table
from kavatar_jax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig, Wav2Vec2Config, WhisperConfig
from kavatar_jax.models import clip, dit, umt5, vae, wav2vec2, whisper

ROPE_POSITIONS = 1024  # of the tables that diffusers makes; none are stored
EPS = 1e-6
NOT_COMPARED = (
    "architectures",
    "model_type",
    "dropout_rate",
    "is_encoder_decoder",
    "tie_word_embeddings",
)  # files differ
TEXT_LENGTH = 512  # what diffusers' pipelines fill texts up to; its config.json does not say


@dataclass(frozen=True)
class Names:
    """Of one network. rows, unused: as TORCH and UNUSED of its file.

    needs: fields that config.json has to have; told: config.json -> what the file's config_of reads of it
    describe: our config -> config.json; ValueError if it cannot say what ours is. None where there is no such file
    """

    model: ModuleType
    rows: list[Row]
    unused: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    told: Callable[[dict], dict] = dict
    describe: Callable[[Any], dict] | None = None

    def config_of(self, shapes: Mapping[str, tuple[int, ...]], described: dict) -> Any:
        """Our config, of a file with these shapes and this config.json; ValueError and KeyError as the model's own."""
        if self.rows is not self.model.TORCH:
            found = parameter_shapes(self.rows, shapes)
            shapes = reference_shapes(self.model.TORCH, {path: Shape(shape) for path, shape in found.items()})
        return self.model.config_of(shapes, self.told(described))

    def compare(self, described: dict, config: Any) -> None:
        """ValueError if a file's config.json says anything else than what we would write there."""
        made = self.describe(config) if self.describe is not None else {}
        odd = [
            f"{name} {described[name]!r} (not {value!r})"
            for name, value in made.items()
            if not name.startswith("_") and name not in NOT_COMPARED and described.get(name, value) != value
        ]
        if odd:
            raise ValueError(f"its config.json describes another network than its tensors make: {', '.join(odd)}")


# --- the diffusion transformer


def _describe_wan(c: DiTConfig) -> dict:
    if c.audio is not None and len(c.audio.projection) > 1:
        raise ValueError("it has the audio adapter of the 14B class, of which there is no release")
    _refuse("a Wan transformer", {"predicts": (c.predicts, "velocity"), "reference": (c.reference, "first")})
    return {
        "_class_name": "WanModel",
        "model_type": "t2v" if c.image_width is None else "flf2v" if c.image_positions else "i2v",
        "dim": c.width, "eps": EPS, "ffn_dim": c.mlp, "freq_dim": c.time_width, "in_dim": c.in_channels,
        "num_heads": c.heads, "num_layers": c.layers, "out_dim": c.out_channels, "text_len": c.text_length,
    }  # fmt: skip


def _describe_plain_wan(c: DiTConfig) -> dict:
    if c.audio is not None:
        raise ValueError("it listens to speech, and plain Wan has no such part; write it --to stableavatar")
    return _describe_wan(c)


def _describe_diffusers_wan(c: DiTConfig) -> dict:
    if c.audio is not None:
        raise ValueError(
            "it listens to speech, and diffusers has no class for that; write it --to stableavatar, or the other parts "
            "alone with --only"
        )
    said = {"predicts": (c.predicts, "velocity"), "reference": (c.reference, "first")}
    _refuse("WanTransformer3DModel", said | {"text_length": (c.text_length, TEXT_LENGTH)})
    sees = c.image_width is not None
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(c.patch), "num_attention_heads": c.heads, "attention_head_dim": c.width // c.heads,
        "in_channels": c.in_channels, "out_channels": c.out_channels, "text_dim": c.text_width,
        "freq_dim": c.time_width, "ffn_dim": c.mlp, "num_layers": c.layers, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "eps": EPS, "image_dim": c.image_width,
        "added_kv_proj_dim": c.width if sees else None, "rope_max_seq_len": ROPE_POSITIONS,
        "pos_embed_seq_len": c.image_positions or None,
    }  # fmt: skip


_DIT = [
    (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1", "condition_embedder.time_proj"),
    (r"^img_emb\.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    (r"^img_emb\.proj\.0", "condition_embedder.image_embedder.norm1"),
    (r"^img_emb\.proj\.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3", "condition_embedder.image_embedder.ff.net.2"),
    (r"^img_emb\.proj\.4", "condition_embedder.image_embedder.norm2"),
    (r"^head\.head", "proj_out"),
    (r"^(head\.|(blocks\.\{\}\.))modulation", r"\2scale_shift_table"),
    (r"\.norm3\.", ".norm2."),  # the same norm: each numbers those without parameters in its own way
    (r"\.norm_k_img\.", ".norm_added_k."),
    (r"\.cross_attn\.([kv])_img\.", r".attn2.add_\1_proj."),
    (r"\.(self|cross)_attn\.([qkv])\.", r".\1_attn.to_\2."),
    (r"\.(self|cross)_attn\.o\.", r".\1_attn.to_out.0."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
]


def _renamed(rows: list[Row], rules: list[tuple[str, str]]) -> list[Row]:
    """Rows with every rule applied to their key, in order."""

    def rename(key: str) -> str:
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        return key

    return [row._replace(key=rename(row.key)) for row in rows]


_PLAIN = [row for row in dit.TORCH if "vocal" not in row.key]

# --- the video autoencoder


def _describe_vae(c: VAEConfig) -> dict:
    _refuse("Wan's autoencoder", {"blocks": (c.blocks, 2), "patch": (c.patch, 1), "bypass": (c.bypass, False)})
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": c.width, "z_dim": c.latent_channels, "dim_mult": list(c.multipliers), "num_res_blocks": c.blocks,
        "attn_scales": [], "temperal_downsample": list(c.temporal), "dropout": 0.0,
        "latents_mean": list(c.latent_mean), "latents_std": list(c.latent_std),
    }  # fmt: skip


def _describe_released_vae(c: VAEConfig) -> dict:
    """Of which no file says the mean and the deviation of the latents."""
    latents = {"latent_mean": (c.latent_mean, vae.LATENT_MEAN), "latent_std": (c.latent_std, vae.LATENT_STD)}
    _refuse("the released autoencoder", latents)
    return _describe_vae(c)


_UP = [  # three blocks and a resampling a level; the reference counts them through
    (
        rf"^decoder\.upsamples\.{n}\.",
        f"decoder.up_blocks.{n // 4}.{f'resnets.{n % 4}' if n % 4 < 3 else 'upsamplers.0'}.",
    )
    for n in range(4 * vae.LEVELS)
]
_VAE = [
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(\w+)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.downsamples\.", ".down_blocks."),
    *_UP,
]

# --- the text encoder


def _describe_text(c: UMT5Config) -> dict:
    return {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5",
        "vocab_size": c.vocabulary, "d_model": c.width, "d_kv": c.head_width, "d_ff": c.mlp, "num_layers": c.layers,
        "num_heads": c.heads, "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance, "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": umt5.EPS, "dropout_rate": 0.1, "is_encoder_decoder": True, "tie_word_embeddings": True,
    }  # fmt: skip


def _describe_released_text(c: UMT5Config) -> dict:
    _refuse("the released umT5", {"max_distance": (c.max_distance, umt5.MAX_DISTANCE)})  # which its file does not say
    return _describe_text(c)


_TEXT = [row._replace(key=row.key.split("|")[1]) for row in umt5.TORCH]

# --- the portrait encoder


def _told_of_image(described: dict) -> dict:
    """transformers' defaults, which its files need not say, are those of a smaller tower."""
    activation = described.get("hidden_act", "quick_gelu")
    if activation != "gelu":
        raise ValueError(f"its hidden_act is {activation!r}; the tower of open-CLIP XLM-R ViT-H has 'gelu'")
    return {"num_heads": described.get("num_attention_heads", 12)}


def _describe_image(c: CLIPConfig) -> dict:
    return {
        "architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model",
        "hidden_size": c.width, "intermediate_size": c.mlp, "projection_dim": c.embedding,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_channels": 3, "image_size": c.image_size,
        "patch_size": c.patch, "hidden_act": "gelu", "layer_norm_eps": clip.EPS,
    }  # fmt: skip


_TOWER, _LAYER = "vision_model", "vision_model.encoder.layers.{}"
_IMAGE = table(
    [
        Row(f"{_TOWER}.embeddings.patch_embedding.weight", "patch/kernel", "oihw->hwio"),
        Row(f"{_TOWER}.embeddings.class_embedding", "token", "d->d"),
        Row(f"{_TOWER}.embeddings.position_embedding.weight", "positions", "nd->nd"),
        Row("visual_projection.weight", "head/kernel", "oi->io"),
    ],
    norm(f"{_TOWER}.pre_layrnorm", "norm_pre", bias=True),
    norm(f"{_LAYER}.layer_norm1", "blocks/norm_attn", bias=True),
    *(linear(f"{_LAYER}.self_attn.{name}_proj", f"blocks/{name[0]}") for name in ("q", "k", "v", "out")),
    norm(f"{_LAYER}.layer_norm2", "blocks/norm_mlp", bias=True),
    linear(f"{_LAYER}.mlp.fc1", "blocks/up"),
    linear(f"{_LAYER}.mlp.fc2", "blocks/down"),
    norm(f"{_TOWER}.post_layernorm", "norm_post", bias=True),
)
_IMAGE = [row._replace(path=row.path.replace("blocks/out", "blocks/o")) for row in _IMAGE]

# --- the speech encoder


def _describe_wav2vec2(c: Wav2Vec2Config) -> dict:
    return {
        "architectures": ["Wav2Vec2Model"], "model_type": "wav2vec2",
        "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "intermediate_size": c.mlp, "num_feat_extract_layers": len(c.conv_widths), "conv_dim": list(c.conv_widths),
        "conv_kernel": list(c.conv_kernels), "conv_stride": list(c.conv_strides), "conv_bias": c.conv_bias,
        "feat_extract_norm": "layer" if c.stable else "group", "do_stable_layer_norm": c.stable,
        "num_conv_pos_embeddings": c.position_kernel, "num_conv_pos_embedding_groups": c.position_groups,
        "layer_norm_eps": wav2vec2.EPS, "hidden_act": "gelu", "feat_extract_activation": "gelu",
    }  # fmt: skip


def _describe_whisper(c: WhisperConfig) -> dict:
    return {
        "architectures": ["WhisperModel"], "model_type": "whisper",
        "d_model": c.width, "encoder_layers": c.layers, "encoder_attention_heads": c.heads, "encoder_ffn_dim": c.mlp,
        "num_mel_bins": c.bands, "max_source_positions": c.positions, "activation_function": "gelu",
    }  # fmt: skip


def _refuse(what: str, said: dict[str, tuple[Any, Any]]) -> None:
    odd = [f"{name} is {value!r} (not {kept!r})" for name, (value, kept) in said.items() if value != kept]
    if odd:
        raise ValueError(f"{what} cannot be what it is: {', '.join(odd)}")


ORIGINAL = {  # of the releases of StableAvatar and Wan
    "dit": Names(dit, dit.TORCH, dit.UNUSED, needs=("num_heads",), describe=_describe_wan),
    "vae": Names(vae, vae.TORCH, vae.UNUSED, describe=_describe_released_vae),
    "text": Names(umt5, umt5.TORCH, umt5.UNUSED, describe=_describe_released_text),
    "image": Names(clip, clip.TORCH, clip.UNUSED),
    "speech": Names(wav2vec2, wav2vec2.TORCH, wav2vec2.UNUSED, describe=_describe_wav2vec2),
}
PLAIN_DIT = Names(dit, _PLAIN, needs=("num_heads",), describe=_describe_plain_wan)
DIFFUSERS = {
    "dit": Names(
        dit, _renamed(_PLAIN, _DIT),
        (r"blocks\.\d+\.attn2\.norm_added_q\.weight",),  # of older files; never read
        needs=("num_attention_heads",),
        told=lambda described: {"num_heads": described["num_attention_heads"]},
        describe=_describe_diffusers_wan,
    ),
    "vae": Names(vae, _renamed(vae.TORCH, _VAE), describe=_describe_vae),
    "text": Names(umt5, _TEXT, umt5.UNUSED, describe=_describe_text),
    "image": Names(
        clip, _IMAGE, (rf"{_TOWER}\.embeddings\.position_ids",), told=_told_of_image, describe=_describe_image
    ),
}  # fmt: skip
LORA = [ORIGINAL["dit"].rows, DIFFUSERS["dit"].rows]  # what LoRA files call the transformer's modules
SPEECH = {  # by the model_type of transformers
    "wav2vec2": ORIGINAL["speech"],
    "whisper": Names(whisper, whisper.TORCH, whisper.UNUSED, describe=_describe_whisper),
}
# as WhisperModel has it, of which the encoder alone is written
WHISPER = replace(SPEECH["whisper"], rows=[row._replace(key=row.key.split("|")[1]) for row in whisper.TORCH])
