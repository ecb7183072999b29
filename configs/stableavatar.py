"""StableAvatar-1.3B at its published sizes, with the sampler settings of its release."""

from dataclasses import replace

from kavatar_jax.config import (
    AudioAdapterConfig,
    CascadeConfig,
    CLIPConfig,
    Config,
    DiTConfig,
    SamplingConfig,
    UMT5Config,
    VAEConfig,
    Wav2Vec2Config,
)
from kavatar_jax.models.vae import LATENT_MEAN, LATENT_STD

# Wan2.1's negative prompt, Wan-Video/Wan2.1 wan/configs/shared_config.py
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


def config() -> Config:
    """512 x 512, what transformer3d-square.pt was trained on."""
    half = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    return Config(
        name="stableavatar",
        width=512,
        height=512,
        fps=25,
        dit=DiTConfig(
            width=1536,
            heads=12,
            layers=30,
            mlp=8960,
            in_channels=36,
            out_channels=16,
            time_width=256,
            text_width=4096,
            text_length=512,
            image_width=1280,
            image_positions=0,
            audio=AudioAdapterConfig(speech_width=768, projection=(1536,), heads=8, mlp=3072, layers=2),
            **half,
        ),
        vae=VAEConfig(width=96, latent_channels=16, latent_mean=LATENT_MEAN, latent_std=LATENT_STD),
        text=UMT5Config(vocabulary=256384, width=4096, heads=64, head_width=64, mlp=10240, layers=24, **half),
        image=CLIPConfig(width=1280, heads=16, layers=32, mlp=5120, image_size=224, patch=14, embedding=1024),
        speech=Wav2Vec2Config(
            width=768,
            heads=12,
            layers=12,
            mlp=3072,
            conv_widths=(512,) * 7,
            conv_kernels=(10, 3, 3, 3, 3, 2, 2),
            conv_strides=(5, 2, 2, 2, 2, 2, 2),
            position_kernel=128,
            position_groups=16,
            stable=False,
            conv_bias=False,
        ),
        negative_prompt=NEGATIVE_PROMPT,
        sampling=SamplingConfig(
            steps=50,
            shift=5.0,
            double_shift=True,
            text_scale=3.0,
            audio_scale=5.0,
            window_frames=81,
            overlap=5,
            fusion="log",
            indexing="exact",
            windows_per_batch=1,
        ),
        cascade=CascadeConfig(blueprint_scale=0.5, blueprint_steps=30, search_seconds=0.4),
    )


def landscape() -> Config:
    """832 x 480, for transformer3d-rec-vec.pt."""
    return replace(config(), name="stableavatar:landscape", width=832, height=480)


def portrait() -> Config:
    """480 x 832, for transformer3d-rec-vec.pt."""
    return replace(config(), name="stableavatar:portrait", width=480, height=832)


def released() -> Config:
    """The released sampler to the letter: its mistimed audio windows, linear fusion weights."""
    base = config()
    sampling = replace(base.sampling, indexing="released", fusion="uniform")
    return replace(base, name="stableavatar:released", sampling=sampling)


def fourteen_b() -> Config:
    """StableAvatar's 14B class, on Wan2.1-I2V-14B; no weights of it have been released."""
    base = config()
    audio = AudioAdapterConfig(speech_width=768, projection=(2048, 5120), heads=8, mlp=10240, layers=2)
    dit = replace(base.dit, width=5120, heads=40, layers=40, mlp=13824, audio=audio)
    return replace(base, name="stableavatar:fourteen_b", dit=dit)
