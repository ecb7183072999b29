"""Training StableAvatar on clips in its own folder layout, from released weights; the recipe of its scripts, mended.

Run with --set data.folder=... --set weights=...; what differs from the release: float32 masters, epsilon, motion along
frames, masks grouped as the autoencoder groups pixels. `released` has these as they were.
"""

from dataclasses import replace

from configs import stableavatar
from kavatar_jax.training.config import (
    ADAPTER,
    ATTENTION_AND_ADAPTER,
    DIRECTOR,
    EVERY_LINEAR,
    RELEASED,
    TEXT_CROSS_ATTENTION,
    Bucket,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoRAConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    TrainedConfig,
)  # fmt: skip


def config() -> TrainConfig:
    """All block parameters and the adapter, three sizes in turn, a batch of 8 over fsdp."""
    model = stableavatar.config()
    sizes = {"video_rec_path.txt": (832, 480), "video_vec_path.txt": (480, 832), "video_square_path.txt": (512, 512)}
    return TrainConfig(
        name="train_stableavatar",
        model=replace(model, dit=replace(model.dit, remat="attention")),
        task="dit",
        steps=20_000,
        weights="weights/stableavatar",
        data=DataConfig(
            source="clips",
            folder="talking_face_data",
            buckets=tuple(
                Bucket(width=w, height=h, frames=81, batch=8, clips=clips) for clips, (w, h) in sizes.items()
            ),
        ),
        trained=TrainedConfig(patterns=RELEASED),
        optimizer=OptimizerConfig(
            learning_rate=2e-5, warmup=100, weight_decay=0.03, clip=0.05, clip_start=5.0, clip_settle=1000, spike=5.0
        ),
        checkpoint=CheckpointConfig(every=500, keep=3),
        mesh=MeshConfig(data=1, fsdp=-1),
        log=LogConfig(every=10),
    )


def released() -> TrainConfig:
    """The release's objective to the letter."""
    base = config()
    objective = ObjectiveConfig(posterior="released", masks="released", motion="channels")
    optimizer = replace(base.optimizer, eps=1e-10)
    return replace(base, name="train_stableavatar:released", objective=objective, optimizer=optimizer)


def attention() -> TrainConfig:
    """What the paper says is trained: attention and the adapter."""
    return replace(config(), name="train_stableavatar:attention", trained=TrainedConfig(patterns=ATTENTION_AND_ADAPTER))


def adapter() -> TrainConfig:
    return replace(config(), name="train_stableavatar:adapter", trained=TrainedConfig(patterns=ADAPTER))


def director() -> TrainConfig:
    """The projection of a director's hidden states, of width 3584 (Qwen2.5-7B); each clip has its own director.npy."""
    base = config()
    model = replace(base.model, dit=replace(base.model.dit, director_width=3584))
    return replace(
        base, name="train_stableavatar:director", model=model, trained=TrainedConfig(patterns=DIRECTOR),
        fresh=(r"dit/director/.*", r"dit/blocks/cross_attn/director_gate"),
    )  # fmt: skip


def lora() -> TrainConfig:
    """Rank 128, alpha 64 on every linear that serves no audio, and all of the adapter."""
    lora = LoRAConfig(rank=128, scale=64 / 128, patterns=EVERY_LINEAR)
    return replace(config(), name="train_stableavatar:lora", trained=TrainedConfig(patterns=ADAPTER, lora=lora))


def kling() -> TrainConfig:
    """Kling-Avatar's training tricks: weight on the mouth, random padding, text cross-attention frozen, first-last clips."""
    base = config()
    return replace(
        base,
        name="train_stableavatar:kling",
        data=replace(base.data, padding=0.3, padding_most=0.45, first_last=0.5),
        trained=TrainedConfig(patterns=RELEASED, frozen=TEXT_CROSS_ATTENTION),
        objective=ObjectiveConfig(weighting="none", lip_weight=3.0),
        optimizer=replace(base.optimizer, learning_rate=1e-5),
    )


def full() -> TrainConfig:
    """Everything in the 14B model, from Wan2.1's own weights: fsdp and context over a pod, the adapter fresh.

    Where 13 GiB a clip of 480p can be spared, --set model.dit.remat=attention does an eighth less work.
    """
    base = config()
    return replace(
        base,
        name="train_stableavatar:full",
        model=stableavatar.fourteen_b(),
        weights="weights/wan2.1-i2v-14b",
        fresh=(r"dit/audio/.*", r"dit/blocks/cross_attn/[kv]_audio/.*"),
        trained=TrainedConfig(patterns=(r"dit/.*",)),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup=100, weight_decay=0.03, clip=1.0, ema=0.999),
        mesh=MeshConfig(data=1, fsdp=-1, context=4),
    )
