"""The demo's autoencoder, trained on puppets: 16x smaller in space and 4x in time, with most of its care for mouths.

    python tools/principal.py demo_vae START --clips 240 --set model.vae.blocks=0
    python tools/gate.py START

is the best linear autoencoder, and all there is in the demo. A decoder beside it may learn what is not linear:

    python tools/principal.py demo_vae START --clips 240
    kavatar train --config demo_vae --set weights=START --out RUN
    python tools/gate.py RUN/weights

The latents are START's in either case, so a transformer may be trained on them meanwhile.
Pictures, clips and close-ups of mouths in turn: pictures teach the many looks cheaply, clips the motion, close-ups four
mouths for the price of one.
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
    long = Bucket(width=128, height=128, frames=33, batch=1)
    return TrainConfig(
        name="demo_vae",
        model=replace(demo.config(), vae=replace(demo.config().vae, blocks=1)),
        task="vae",
        steps=1000,
        data=DataConfig(source="puppets", buckets=(pictures, mouths, long), seed=1),
        trained=TrainedConfig(patterns=(r"vae/decoder/.*",), frozen=(r"vae/.*/bypass/.*",)),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=2e-3, warmup=50, schedule="cosine", final=0.02, b2=0.99, ema=0.99
        ),
        reconstruction=ReconstructionConfig(lip_weight=20.0, motion=0.3, kl=0.0, spread=0.0),
        checkpoint=CheckpointConfig(every=250, keep=2),
        log=LogConfig(every=20),
    )
