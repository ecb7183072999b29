"""Every frozen dataclass that describes a training run, with its checks, and the usual sets of what is trained.

Patterns are regular expressions that must match a whole parameter path, "dit/blocks/self_attn/q/kernel".
"""

from dataclasses import dataclass, field

from kavatar_jax.config import Config, MeshConfig, VAEConfig, load_config, set_fields
from kavatar_jax.puppets.records import SPLITS

EVERYTHING = (r"dit/.*",)
RELEASED = (r"dit/blocks/.*", r"dit/audio/.*")  # what StableAvatar's scripts train
ATTENTION_AND_ADAPTER = (r"dit/blocks/(self|cross)_attn/.*", r"dit/audio/.*")  # what its paper says
ADAPTER = (r"dit/audio/.*", r"dit/blocks/cross_attn/[kv]_audio/.*")
DIRECTOR = (r"dit/director/.*", r"dit/blocks/cross_attn/director_gate")
# queries and output serve audio too; freezing them as well keeps what text alone would give (Kling-Avatar, section 2.4)
TEXT_CROSS_ATTENTION = (r"dit/blocks/cross_attn/([qkvo]|norm_[qk])/.*", r"dit/text/.*")
EVERY_LINEAR = (r"dit/(?!audio/|director/)(?!.*_audio/).*",)  # StableAvatar: every linear whose path names no audio

TASKS = ("dit", "vae", "text", "speech")
SOURCES = ("puppets", "clips", "prepared", "prompts", "voices")


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Clips of one size, for which one program is compiled.

    frames: 4n+1; batch: clips of a step, over all devices; weight: how often the bucket is drawn
    clips: for the source "clips", the file that lists its folders
    closeup: how many times as large the source's pictures are, of which the part around the mouth is taken
    """

    width: int
    height: int
    frames: int
    batch: int
    weight: float = 1.0
    clips: str = ""
    closeup: int = 1

    def __post_init__(self):
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(f"a bucket of {self.frames} frames: it must be 4n+1, as in 81")
        _positive("batch of a bucket", self.batch)
        _positive("weight of a bucket", self.weight)
        _positive("closeup of a bucket", self.closeup)

    @property
    def source_size(self) -> tuple[int, int]:
        """Width and height of the pictures that clips are cut from."""
        return self.width * self.closeup, self.height * self.closeup


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from and what is shown of each.

    source: "puppets", "clips" (folders as StableAvatar lays them out), "prepared" (latents on disk), "prompts" (what
    puppets are told, alone) or "voices" (what they say, and their mouths' shapes)
    folder: of clips and prepared ones; split: of puppets, "train" or "held out"
    directed: puppets' prompts as the director would word them for each clip
    driven: how far puppets' mouths follow the sound alone; see puppets.records
    first_last: share of clips of which a later frame is given as well as the first, both their own: the end of any latent,
    as sub-clips may be shorter than a window
    portrait: share of the others whose given first frame is the record's portrait, where it has one
    padding: share of clips with empty pixels around them, each side up to padding_most of the frame (Kling-Avatar, 2.4)
    whole_masks: clips without masks count as all face and all lips, as released; else they are an error
    threads, workers, ahead: that load batches in each process, processes beside it (0: none), batches kept ready
    """

    source: str
    buckets: tuple[Bucket, ...]
    folder: str = ""
    split: str = "train"
    directed: bool = False
    driven: float = 0.0
    seed: int = 0
    first_last: float = 0.0
    portrait: float = 0.0
    padding: float = 0.0
    padding_most: float = 0.25
    whole_masks: bool = False
    threads: int = 2
    workers: int = 0
    ahead: int = 2

    def __post_init__(self):
        _one_of("data.source", self.source, SOURCES)
        _one_of("data.split", self.split, SPLITS)
        for name in ("first_last", "portrait", "padding", "driven"):
            _share(f"data.{name}", getattr(self, name))
        if not 0 <= self.padding_most < 0.5:
            raise ValueError(f"data.padding_most is {self.padding_most}; a side takes at least 0 and less than 0.5")
        if not self.buckets:
            raise ValueError("data.buckets is empty; give at least one Bucket")
        if self.source in ("clips", "prepared") and not self.folder:
            raise ValueError(f"data.source is {self.source!r} and data.folder is empty; say where the data is")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Flow matching on latents; the fields' comments give the source.

    posterior: latents are its "mode", a "sample", or a "released" sample (noise not divided by the latent statistics)
    timesteps: "uniform" or "logit_normal" (mean, std), then moved by `shift`; stratified: one slice of the range each
    channels: what errors of each latent channel weigh against one another, () for all alike; lip_channels: the same of the
    errors that `lip_weight` adds, () for as everywhere
    least_sigma: errors of the velocity are weighted by (sigma / max(sigma, least_sigma))^2; 0 for no weight
    weighting: "piecewise" is StableAvatar's random use of the masks; lip_weight: of the loss inside the lip mask
    masks: to latent size "released" (trilinear, evenly in time) or "grouped" (mean over the pixels of each latent)
    motion: difference of latents along "frames", "channels" (as released) or "none"; motion_weight: its share
    drop_audio, drop_text, drop_image: share of clips that are not told; silence: audio is dropped as zero "features", as
    released, or as zero "tokens" after the adapter, as guidance does; clip_level: share of steps with audio over the clip
    """

    posterior: str = "sample"
    timesteps: str = "uniform"
    shift: float = 5.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    stratified: bool = True
    least_sigma: float = 0.0
    channels: tuple[float, ...] = ()
    lip_channels: tuple[float, ...] = ()
    weighting: str = "piecewise"
    lip_weight: float = 1.0
    masks: str = "grouped"
    motion: str = "frames"
    motion_weight: float = 0.25
    drop_audio: float = 0.1
    drop_text: float = 0.0
    drop_image: float = 0.0
    silence: str = "features"
    clip_level: float = 0.3

    def __post_init__(self):
        _one_of("objective.posterior", self.posterior, ("mode", "sample", "released"))
        _one_of("objective.timesteps", self.timesteps, ("uniform", "logit_normal"))
        _one_of("objective.weighting", self.weighting, ("piecewise", "none"))
        _one_of("objective.masks", self.masks, ("released", "grouped"))
        _one_of("objective.motion", self.motion, ("frames", "channels", "none"))
        _one_of("objective.silence", self.silence, ("features", "tokens"))
        for name in ("channels", "lip_channels"):
            if min(getattr(self, name), default=1) <= 0:
                raise ValueError(f"objective.{name} are weights above 0, and one is {min(getattr(self, name))}")
        for name in ("motion_weight", "drop_audio", "drop_text", "drop_image", "clip_level", "least_sigma"):
            _share(f"objective.{name}", getattr(self, name))
        _positive("objective.lip_weight", self.lip_weight)
        _positive("objective.shift", self.shift)


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """What the autoencoder learns: |error| of pixels and of their differences in time, and the posterior kept near normal.

    lip_weight, face_weight: of the error inside the masks; motion: of the differences; kl: of the divergence
    spread: how much of the posterior's deviation is drawn, 0 for its mode alone
    noise: most of the normal noise, in deviations of the latents, that a clip's latents have when they are decoded, so that
    the decoder mends what a transformer leaves unsaid
    chunk: latent frames worked on at a time, None for all at once
    """

    kl: float = 1e-6
    spread: float = 1.0
    noise: float = 0.0
    lip_weight: float = 1.0
    face_weight: float = 1.0
    motion: float = 0.0
    chunk: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """patterns: linears that get a branch; scale: alpha / rank, by which the branch is multiplied."""

    rank: int
    scale: float
    patterns: tuple[str, ...] = EVERY_LINEAR

    def __post_init__(self):
        _positive("trained.lora.rank", self.rank)


@dataclass(frozen=True, kw_only=True)
class TrainedConfig:
    """patterns: parameters that learn, less those that `frozen` matches; lora: branches beside them."""

    patterns: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    lora: LoRAConfig | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """kind: "adamw", or "muon" for kernels (Jordan 2024) with Adam for the rest.

    schedule: after `warmup` steps "constant", or "cosine" down to `final` of the rate at the last step
    clip: greatest norm of the gradient; at the start it is clip_start times as much, falling to it over clip_settle steps.
    spike: a norm more than this many times the limit, after it has settled, is clipped to as many times less than the
    limit, ten at most (StableAvatar's rule, with 5); 0 for never. decayed: parameters under weight decay
    accumulate: parts of the batch that are worked on one after the other; ema: decay of the averaged weights, 0 for none
    """

    learning_rate: float
    kind: str = "adamw"
    warmup: int = 100
    schedule: str = "constant"
    final: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decayed: tuple[str, ...] = (r".*",)
    clip: float = 1.0
    clip_start: float = 1.0
    clip_settle: int = 0
    spike: float = 0.0
    accumulate: int = 1
    ema: float = 0.0

    def __post_init__(self):
        _one_of("optimizer.kind", self.kind, ("adamw", "muon"))
        _one_of("optimizer.schedule", self.schedule, ("constant", "cosine"))
        _positive("optimizer.clip", self.clip)
        _positive("optimizer.accumulate", self.accumulate)
        _share("optimizer.ema", self.ema)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """every: steps between checkpoints; keep: how many stay on disk."""

    every: int
    keep: int = 3

    def __post_init__(self):
        _positive("checkpoint.every", self.every)
        _positive("checkpoint.keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """every: steps between lines; bands: equal parts of [0, 1] by noise level; peak: FLOP/s of a device, 0 if by name."""

    every: int = 10
    bands: int = 5
    peak: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """A look at fixed clips every so many steps. data: one bucket, whose first `batch` clips; steps: of the solver."""

    every: int
    data: DataConfig
    steps: int = 12
    shift: float = 5.0
    text_scale: float = 1.0
    audio_scale: float = 1.0

    def __post_init__(self):
        if self.data.source == "prepared" or len(self.data.buckets) != 1:
            raise ValueError("samples.data must have one bucket, and pixels: the source 'puppets' or 'clips'")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run.

    model: every network; task: which of them learns, "dit" (with encoders named in `trained`, if any), "vae",
        "text" or "speech"
    weights: directory to start from, "" to start afresh; fresh: parameters that start anew, whether it holds them or not
    """

    name: str
    model: Config
    task: str
    steps: int
    data: DataConfig
    trained: TrainedConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    seed: int = 0
    weights: str = ""
    fresh: tuple[str, ...] = ()
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    mesh: MeshConfig = MeshConfig()
    log: LogConfig = LogConfig()
    samples: SamplesConfig | None = None

    def __post_init__(self):
        _one_of("task", self.task, TASKS)
        _positive("steps", self.steps)
        if self.task == "vae" and self.data.source not in ("puppets", "clips"):
            raise ValueError("the autoencoder learns from pixels; data.source must be 'puppets' or 'clips'")
        for task, source in (("text", "prompts"), ("speech", "voices")):
            if (self.task == task) != (self.data.source == source):
                raise ValueError(f"the task {task!r} learns from the source {source!r}, and no other does")
        if self.model.dit.quantised:
            raise ValueError(
                f"dit.quantised is {self.model.dit.quantised!r}; rounding has no gradient, so train without it"
            )
        for name in ("channels", "lip_channels"):
            given, latent = len(getattr(self.objective, name)), self.model.dit.out_channels
            if given not in (0, latent):
                raise ValueError(f"objective.{name} are {given}, and there are {latent} latent channels")
        for bucket in self.data.buckets:
            if bucket.batch % self.optimizer.accumulate:
                raise ValueError(
                    f"a batch of {bucket.batch} cannot be cut into optimizer.accumulate = {self.optimizer.accumulate} parts"
                )


def load_training(name: str, fields: list[str]) -> TrainConfig:
    """The run that a name in configs/, NAME:VARIANT, or a file describes, with fields replaced. ValueError if it is none."""
    config = set_fields(load_config(name), fields)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{name} describes no training run; configs/train_tiny.py and its neighbours do")
    return config


def latent_size(frames: int, height: int, width: int, config: VAEConfig) -> tuple[int, int, int]:
    """(T, h, w) of a clip's latents."""
    return (frames - 1) // config.stride + 1, height // config.side, width // config.side


def _one_of(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _positive(name, value):
    if value <= 0:
        raise ValueError(f"{name} is {value}; it must be more than 0")


def _share(name, value):
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it is a share, from 0 to 1")
