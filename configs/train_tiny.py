"""Training at sizes for tests: networks that say nothing, clips of 9 frames of 32 x 32; every mechanism of the trainer."""

from dataclasses import replace

from configs import demo
from kavatar_jax.config import Config
from kavatar_jax.training.config import (
    ADAPTER,
    DIRECTOR,
    EVERYTHING,
    Bucket,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoRAConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReconstructionConfig,
    SamplesConfig,
    TrainConfig,
    TrainedConfig,
)  # fmt: skip


def config() -> TrainConfig:
    """Everything in the transformer, and the text encoder with it."""
    data = DataConfig(source="puppets", buckets=(Bucket(width=32, height=32, frames=9, batch=8),), first_last=0.3)
    return TrainConfig(
        name="train_tiny",
        model=model(),
        task="dit",
        steps=10,
        data=data,
        trained=TrainedConfig(patterns=(*EVERYTHING, r"text/.*")),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=2, weight_decay=0.01, accumulate=2, ema=0.9),
        objective=ObjectiveConfig(lip_weight=5.0, drop_text=0.1, clip_level=0.0),
        checkpoint=CheckpointConfig(every=5, keep=2),
        log=LogConfig(every=1),
    )


def watched() -> TrainConfig:
    """With samples of voices and looks that training never meets."""
    base = config()
    data = replace(base.data, buckets=(replace(base.data.buckets[0], batch=1),), split="held out", first_last=0.0)
    return replace(base, name="train_tiny:watched", samples=SamplesConfig(every=5, data=data, steps=2))


def adapter() -> TrainConfig:
    return replace(config(), name="train_tiny:adapter", trained=TrainedConfig(patterns=ADAPTER))


def director() -> TrainConfig:
    return replace(config(), name="train_tiny:director", trained=TrainedConfig(patterns=DIRECTOR))


def lora() -> TrainConfig:
    return replace(
        config(),
        name="train_tiny:lora",
        trained=TrainedConfig(patterns=ADAPTER, lora=LoRAConfig(rank=4, scale=0.5)),
    )


def vae() -> TrainConfig:
    return replace(
        config(),
        name="train_tiny:vae",
        task="vae",
        trained=TrainedConfig(patterns=(r"vae/.*",)),
        reconstruction=ReconstructionConfig(lip_weight=10.0, motion=0.1),
    )


def model() -> Config:
    base = demo.tiny()
    dit = replace(base.dit, width=24, heads=2, layers=2, mlp=32, text_width=16, text_length=16, time_width=16,
                  image_width=None, director_width=12, remat="none",
                  audio=replace(base.dit.audio, speech_width=16, projection=(24,), heads=2, mlp=32, layers=1))  # fmt: skip
    return replace(
        base,
        name="tiny",
        width=32,
        height=32,
        dit=dit,
        vae=replace(base.vae, width=4, multipliers=(1, 1, 1, 1), blocks=1),
        text=replace(base.text, width=16, heads=1, head_width=16, mlp=32, layers=1),
        speech=replace(base.speech, width=16, heads=1, layers=1, mlp=32, conv_widths=(8,) * 7, position_groups=2),
    )
