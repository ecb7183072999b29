"""The demo's text encoder, trained on what puppets are told: bytes in, the emotion, actions and camera asked for out."""

from configs import demo
from kavatar_jax.training.config import (
    Bucket,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
    TrainedConfig,
)


def config() -> TrainConfig:
    prompts = Bucket(width=128, height=128, frames=1, batch=32)
    return TrainConfig(
        name="demo_text",
        model=demo.config(),
        task="text",
        steps=800,
        data=DataConfig(source="prompts", buckets=(prompts,), seed=2),
        trained=TrainedConfig(patterns=(r"text/.*",)),
        optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, warmup=50, schedule="cosine", final=0.02, ema=0.99),
        checkpoint=CheckpointConfig(every=500, keep=2),
        log=LogConfig(every=20),
    )
