"""The demo's transformer and audio adapter, trained on puppets whose latents were computed beforehand.

    python tools/bundle.py ENCODERS START TEXT_RUN/weights SPEECH_RUN/weights
    python tools/prepare.py demo_dit CLIPS --count 12800 --set data.source=puppets --set weights=ENCODERS
    kavatar train --config demo_dit --set data.folder=CLIPS --set weights=ENCODERS --out RUN
    python tools/bundle.py WEIGHTS ENCODERS RUN/weights --half --fill demo

START, TEXT_RUN and SPEECH_RUN are those of demo_vae, demo_text and demo_speech. An autoencoder that demo_vae goes on to
train has START's latents, and may take its place in the end. `kavatar generate --config demo --weights WEIGHTS` uses the
last.
What makes lips learn soon: a speech encoder that knows what mouths do; prediction of the clean latents with a clipped
weight, as a change from the picture shown in every frame; errors weighed as they show in the pixels, and many times on
the lips, where speech would otherwise be half a percent of the loss; and many clips: 3,200 are learnt by heart.
"""

from configs import demo
from kavatar_jax.training.config import (
    EVERYTHING,
    Bucket,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    TrainedConfig,
)

# Of a channel's change in lips, the mouth's part; the rest is the head's. As measured, and trained with, when camera moves
# still began with their clips; tools/mouths.py now gives up to 0.10 more or less.
MOUTHS = (
    0.16, 0.07, 0.17, 0.21, 0.25, 0.23, 0.17, 0.16, 0.28, 0.38, 0.26, 0.18, 0.19, 0.29, 0.52, 0.23,
    0.34, 0.88, 0.56, 0.50, 0.22, 0.26, 0.31, 0.56, 0.61, 0.32, 0.50, 0.55, 0.35, 0.25, 0.65, 0.50,
    0.35, 0.34, 0.48, 0.60, 0.29, 0.58, 0.43, 0.78, 0.72, 0.44, 0.61, 0.66, 0.44, 0.44, 0.30, 0.29,
    0.77, 0.49, 0.43, 0.70, 0.26, 0.52, 0.40, 0.52, 0.51, 0.55, 0.58, 0.54, 0.88, 0.73, 0.77, 0.35,
)  # fmt: skip


def config() -> TrainConfig:
    model = demo.config()
    bucket = Bucket(width=model.width, height=model.height, frames=model.sampling.window_frames, batch=16)
    return TrainConfig(
        name="demo_dit",
        model=model,
        task="dit",
        steps=5000,
        data=DataConfig(
            source="prepared",
            folder="clips",
            buckets=(bucket,),
            directed=True,
            driven=demo.DRIVEN,
            seed=3,
            first_last=0.25,
            portrait=1.0,
        ),
        weights="encoders",
        fresh=(r"dit/.*",),
        trained=TrainedConfig(patterns=EVERYTHING),
        objective=ObjectiveConfig(
            posterior="mode",
            shift=3.0,  # sampling decides about mouths while there is much noise
            least_sigma=0.4,
            weighting="none",
            # components come in the order of how far they move the pixels; all alike, mouths drown in texture
            channels=tuple((n + 1) ** -1.5 for n in range(model.dit.out_channels)),
            lip_weight=40.0,
            # and what moves within a latent, four frames, is mostly mouths
            lip_channels=tuple((n + 1) ** -1.5 * share**2 for n, share in enumerate(MOUTHS)),
            motion="none",
            drop_audio=0.1,
            drop_text=0.1,
            silence="tokens",
            clip_level=0.0,
        ),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=2e-3, warmup=100, schedule="cosine", final=0.02, ema=0.998
        ),
        checkpoint=CheckpointConfig(every=250, keep=2),
        log=LogConfig(every=20),
    )
