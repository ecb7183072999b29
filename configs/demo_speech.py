"""The demo's speech encoder, trained on puppets' voices: sound in, the opening and width of the mouth out.

How loud loud is it learns from the 3 s before a window, `speech.memory`, as far as there was any sound.

kavatar train --config demo_speech --out RUN
"""

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
    model = demo.config()
    voices = Bucket(width=model.width, height=model.height, frames=model.sampling.window_frames, batch=32)
    return TrainConfig(
        name="demo_speech",
        model=model,
        task="speech",
        steps=1500,
        data=DataConfig(source="voices", buckets=(voices,), driven=demo.DRIVEN, seed=4, ahead=8),
        trained=TrainedConfig(patterns=(r"speech/.*",)),
        optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, warmup=50, schedule="cosine", final=0.02, ema=0.99),
        checkpoint=CheckpointConfig(every=250, keep=2),
        log=LogConfig(every=20),
    )
