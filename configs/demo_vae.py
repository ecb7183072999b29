"""The demo's autoencoder, trained on puppets: 16x smaller in space and 4x in time, with most of its care for mouths.

Pictures, clips and close-ups of mouths in turn: pictures teach the many looks cheaply, clips the motion, close-ups four
mouths for the price of one. `config` begins from chance, `more` from the weights that it is given with --set weights=DIR.
"""

from dataclasses import replace

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
    mouths = Bucket(width=64, height=64, frames=33, batch=4, closeup=2, weight=2.0)
    long = Bucket(width=128, height=128, frames=33, batch=1)  # or colours wander in the frames after the first few
    return TrainConfig(
        name="demo_vae",
        model=demo.config(),
        task="vae",
        steps=3400,
        data=DataConfig(source="puppets", buckets=(pictures, mouths, long), seed=1),
        trained=TrainedConfig(patterns=(r"vae/.*",)),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=2e-3, warmup=50, schedule="cosine", final=0.02, b2=0.99, ema=0.99
        ),
        reconstruction=ReconstructionConfig(lip_weight=10.0, motion=0.2, spread=0.0),
        checkpoint=CheckpointConfig(every=300, keep=2),
        log=LogConfig(every=20),
    )


def more() -> TrainConfig:
    """More of the same, with still more care for mouths."""
    first = config()
    return replace(
        first,
        name="demo_vae_more",
        steps=3000,
        data=replace(first.data, seed=2),
        optimizer=replace(first.optimizer, learning_rate=1.2e-3),
        reconstruction=replace(first.reconstruction, lip_weight=20.0, motion=0.3),
    )
