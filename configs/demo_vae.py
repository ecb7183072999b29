"""The demo's autoencoder, trained on puppets: 16x smaller in space and 4x in time, with most of its care for mouths.

Pictures and short clips in turn: pictures teach the many looks cheaply, clips the motion.
"""

from configs import demo
from kavatar_jax.training.config import (
    Bucket,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    ReconstructionConfig,
    TrainConfig,
    TrainedConfig,
)


def config() -> TrainConfig:
    pictures = Bucket(width=128, height=128, frames=1, batch=16)
    short = Bucket(width=128, height=128, frames=17, batch=2)
    long = Bucket(width=128, height=128, frames=33, batch=1)  # or colours wander in the frames after the first few
    return TrainConfig(
        name="demo_vae",
        model=demo.config(),
        task="vae",
        steps=3400,
        data=DataConfig(source="puppets", buckets=(pictures, short, long), seed=1),
        trained=TrainedConfig(patterns=(r"vae/.*",)),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=2e-3, warmup=50, schedule="cosine", final=0.02, b2=0.99, ema=0.99
        ),
        reconstruction=ReconstructionConfig(lip_weight=10.0, motion=0.2, spread=0.0),
        checkpoint=CheckpointConfig(every=300, keep=2),
        log=LogConfig(every=20),
    )
