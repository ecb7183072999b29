"""The demo: every network small enough for two CPU cores, at 128 x 128."""

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
    WhisperConfig,
)
from kavatar_jax.models.vae import LATENT_MEAN, LATENT_STD

DRIVEN = 0.75  # of the openings that its networks are taught, what the sound does; the rest is what the phones say


def config() -> Config:
    return Config(
        name="demo",
        width=128,
        height=128,
        fps=25,
        dit=DiTConfig(
            width=192,
            heads=3,
            layers=9,
            mlp=768,
            in_channels=132,
            out_channels=64,
            time_width=128,
            text_width=64,
            text_length=256,
            image_width=None,
            image_positions=0,
            predicts="change",
            skip=True,
            reference="every",
            remat="none",
            audio=AudioAdapterConfig(speech_width=96, projection=(192,), heads=3, mlp=384, layers=2, pack=17),
        ),
        vae=VAEConfig(
            width=16,
            latent_channels=64,
            latent_mean=(0.0,) * 64,
            latent_std=(1.0,) * 64,
            multipliers=(1, 2, 3),
            blocks=0,
            temporal=(True, True),
            patch=4,
            bypass=True,
        ),
        text=UMT5Config(vocabulary=260, width=64, heads=4, head_width=16, mlp=128, layers=2),
        image=CLIPConfig(width=64, heads=4, layers=3, mlp=256, image_size=224, patch=14, embedding=32),
        speech=WhisperConfig(width=96, heads=3, layers=3, mlp=384, bands=40, positions=256, filled=False, memory=150),
        negative_prompt="blurry, distorted",
        sampling=SamplingConfig(
            steps=8,
            shift=3.0,
            double_shift=False,
            text_scale=4.0,
            audio_scale=2.0,
            window_frames=33,
            overlap=3,
            fusion="log",
            indexing="exact",
            windows_per_batch=2,
        ),
        # networks this small know one size only, so the blueprint is as large as the video
        cascade=CascadeConfig(blueprint_scale=1.0, blueprint_steps=8, search_seconds=0.4),
    )


def tiny() -> Config:
    """For tests: 48 x 32 and windows of 21 frames; every mechanism, nothing to look at."""
    base = config()
    dit = replace(
        base.dit,
        width=48,
        heads=2,
        layers=2,
        mlp=64,
        in_channels=36,
        out_channels=16,
        image_width=64,
        predicts="velocity",
        skip=False,
        reference="first",
        time_width=32,
        text_length=32,
        audio=AudioAdapterConfig(speech_width=64, projection=(48,), heads=2, mlp=64, layers=2),
    )
    return replace(
        base,
        name="demo:tiny",
        width=48,
        height=32,
        dit=dit,
        vae=VAEConfig(width=8, latent_channels=16, latent_mean=LATENT_MEAN, latent_std=LATENT_STD),
        sampling=replace(
            base.sampling, steps=2, shift=5.0, text_scale=3.0, audio_scale=5.0, window_frames=21, overlap=2
        ),
        speech=Wav2Vec2Config(
            width=64,
            heads=4,
            layers=2,
            mlp=128,
            conv_widths=(32,) * 7,
            conv_kernels=(10, 3, 3, 3, 3, 2, 2),
            conv_strides=(5, 2, 2, 2, 2, 2, 2),
            position_kernel=16,
            position_groups=4,
            stable=False,
            conv_bias=False,
        ),
        cascade=replace(base.cascade, blueprint_scale=0.5, blueprint_steps=2, search_seconds=0.2),
    )
