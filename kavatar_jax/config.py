"""Every frozen dataclass that describes a run, with its checks; and how a run finds one by name and changes a field.

Sizes have no defaults here: they are given once, in `configs/`. Widths and counts use the names of the published
models; `dtype` is what is computed in, `param_dtype` what is stored.
"""

import ast
import dataclasses
import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STACKED = ("dit", "text", "image", "speech")  # networks of layers that are alike
SPEECH_TOKEN = 320  # samples, 20 ms, that a vector of every speech encoder of the family stands for


@dataclass(frozen=True, kw_only=True)
class AudioAdapterConfig:
    """StableAvatar's timestep-aware audio adapter. projection: widths of its input linears, the last is the model's.

    modulated: the timestep modulates it; looking: its blocks look at the latents. Without either, and without layers, it is
    the paper's ablations.
    pack: how many tokens of a slice, around its middle, make one vector more that is added to a frame's tokens in every
    block (after OmniAvatar, arXiv 2506.18866); 0, as released, for none. It tells earlier from later, and is learnt soon.
    """

    speech_width: int
    projection: tuple[int, ...]
    heads: int
    mlp: int
    layers: int
    modulated: bool = True
    looking: bool = True
    pack: int = 0


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The Wan2.1 diffusion transformer and its audio-driven descendants.

    in_channels: 16 noisy channels, and for image conditioning 4 mask and 16 image-latent ones
    image_width: width of the image encoder's tokens, None where there is no image cross-attention
    image_positions: length of the table added to the image tokens (514 in FLF2V), 0 for none
    audio: None for plain Wan
    director_width: width of the director's hidden states, None where there is no projection for them
    predicts: what the head's output stands for: "velocity", the "clean" latents, or their "change" from what the
    condition shows in the same frame, which takes reference="every" to be more than grey
    skip: where it is not the velocity that is predicted, what is noisy also goes straight to the output, each channel by a
    gain that the noise level and the token decide: a network narrower than its latents need not carry their finer parts
    reference: latent frames of the condition that show the first one's picture, the "first" alone or "every" one where
    nothing is given
    quantised: "int8" or "fp8" for products of 8-bit numbers in the linears of the blocks, for inference; "" for none
    remat: what the backward pass finds of a block: "none" to keep everything, "attention" for what its tokens' attention
    to each other gives, most of the work of a long one, or a policy of jax.checkpoint_policies
    """

    width: int
    heads: int
    layers: int
    mlp: int
    in_channels: int
    out_channels: int
    time_width: int
    text_width: int
    text_length: int
    image_width: int | None
    image_positions: int
    audio: AudioAdapterConfig | None
    director_width: int | None = None
    patch: tuple[int, int, int] = (1, 2, 2)
    predicts: str = "velocity"
    skip: bool = False
    reference: str = "first"
    quantised: str = ""
    remat: str = "nothing_saveable"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        _one_of("dit.predicts", self.predicts, ("velocity", "clean", "change"))
        _one_of("dit.reference", self.reference, ("first", "every"))
        _one_of("dit.quantised", self.quantised, ("", "int8", "fp8"))
        if self.skip and self.predicts == "velocity":
            raise ValueError("dit.skip is for predicts=clean and change; a velocity contains what is noisy already")


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Wan2.1's causal 3D VAE: 8x in space, 4x in time. latent_mean, latent_std: one number per latent channel.

    multipliers: of the width, a level each; temporal: whether each step between them halves the frames too
    blocks: of each level; 0 for no networks, the bypass alone
    patch: side of the squares of pixels that are folded into channels first, 1 for none
    bypass: linear maps from the pixels of each latent straight to it and back, beside the networks
    """

    width: int
    latent_channels: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    bypass: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        _at_least("vae.blocks", self.blocks, 0)
        if not self.blocks and not self.bypass:
            raise ValueError("vae.blocks is 0 and vae.bypass is False: nothing is left; set one of them")

    @property
    def side(self) -> int:
        """Pixels per latent, each way."""
        return self.patch * 2 ** len(self.temporal)

    @property
    def stride(self) -> int:
        """Video frames per latent frame."""
        return 2 ** sum(self.temporal)


@dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """The umT5 encoder, one relative-position table per layer."""

    vocabulary: int
    width: int
    heads: int
    head_width: int
    mlp: int
    layers: int
    buckets: int = 32
    max_distance: int = 128
    dtype: str = "float32"
    param_dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """The visual tower of open-CLIP XLM-R ViT-H/14."""

    width: int
    heads: int
    layers: int
    mlp: int
    image_size: int
    patch: int
    embedding: int
    dtype: str = "float32"
    param_dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Wav2Vec2Config:
    """wav2vec 2.0. stable: layer norms before the sublayers and in every convolution (the large models); memory: as
    WhisperConfig's."""

    width: int
    heads: int
    layers: int
    mlp: int
    conv_widths: tuple[int, ...]
    conv_kernels: tuple[int, ...]
    conv_strides: tuple[int, ...]
    position_kernel: int
    position_groups: int
    stable: bool
    conv_bias: bool
    memory: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """Whisper's encoder. bands: of the log-mel energies; positions: of 20 ms each that it knows; filled: whether every
    recording is filled up with silence to all of them, as the published models were trained; memory: how many vectors of
    20 ms before a window it hears too, to know how loud loud is, and gives none of."""

    width: int
    heads: int
    layers: int
    mlp: int
    bands: int = 80
    positions: int = 1500
    filled: bool = True
    memory: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"


SpeechConfig = Wav2Vec2Config | WhisperConfig


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """How large what the transformer's blocks add is, for one branch of guidance at falling noise levels; their quotients
    count alone. branch: its name, as diffusion/caching.py makes it."""

    branch: str
    sigmas: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self):
        if not self.sigmas or len(self.sigmas) != len(self.values) or min(self.values) <= 0:
            raise ValueError(f"the magnitudes of {self.branch!r} are not one number above 0 for each noise level")
        if any(later >= earlier for earlier, later in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError(f"the noise levels of the magnitudes of {self.branch!r} do not fall")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Steps that reuse what the transformer's blocks added at an earlier one (MagCache, arXiv 2506.09045).

    threshold: a branch of guidance reuses as long as its errors, summed up since it last went through the blocks, stay
    below; 0 for never
    longest: most steps in a row that reuse; start: share of the steps, at the start, that never do
    magnitudes: measured by tools/calibrate_cache.py
    """

    threshold: float = 0.0
    longest: int = 2
    start: float = 0.2
    magnitudes: tuple[Magnitudes, ...] = ()

    def __post_init__(self):
        _at_least("sampling.cache.threshold", self.threshold, 0)
        _at_least("sampling.cache.longest", self.longest, 1)
        if not 0 <= self.start <= 1:
            raise ValueError(f"sampling.cache.start is {self.start}; it is a share of the steps, from 0 to 1")
        if self.threshold and not self.magnitudes:
            raise ValueError(
                f"sampling.cache.threshold is {self.threshold}, and no magnitudes are known to decide by; give --cache "
                "FILE, made by tools/calibrate_cache.py"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How latents are drawn.

    solver: "euler", or Wan2.1's "unipc" and "dpm++"
    shift: time shift of the flow-matching schedule; double_shift applies it twice, as the released sampler of StableAvatar
    does, which is Euler's
    spacing: of Euler's noise levels before the shift, "linspace", or "trailing" for networks distilled to few steps
    text_scale, audio_scale: the two scales of three-branch guidance
    guided: lowest and highest noise level at which there is guidance; at others the prompt and the speech alone are told
    native: the two weights of audio native guidance, which takes the place of three-branch guidance unless both are 0
    frame_scale: scale of guidance away from a worn portrait (Kling-Avatar's negative frame), beside either; 1 for none
    frame_guided: lowest and highest of the noise levels of `guided` at which there is that one
    audio_attention: what the blocks' attention to audio is multiplied by, in every branch and at every noise level;
    Kling-Avatar raises it without saying how far, 1 leaves it as it was trained
    window_frames: video frames of a window, 4n+1; overlap: latent frames shared by neighbouring windows, 0 for windows that
    do not touch, such as the one of a plain video
    fusion: weights over the overlap, "log", "uniform", "fixed" halves, or "none": the later window laid over the earlier
    indexing: "exact" (every latent frame hears its own frames) or "released" (StableAvatar's slices)
    windows_per_batch: windows denoised together on each slot of the data axis
    cache: which steps reuse the transformer's work of earlier ones
    """

    steps: int
    shift: float
    double_shift: bool
    text_scale: float
    audio_scale: float
    window_frames: int
    overlap: int
    fusion: str
    indexing: str
    windows_per_batch: int
    native: tuple[float, float] = (0.0, 0.0)
    guided: tuple[float, float] = (0.0, 1.0)
    frame_scale: float = 1.0
    frame_guided: tuple[float, float] = (0.0, 1.0)
    audio_attention: float = 1.0
    solver: str = "euler"
    spacing: str = "linspace"
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)

    def __post_init__(self):
        _one_of("sampling.solver", self.solver, ("euler", "unipc", "dpm++"))
        _one_of("sampling.spacing", self.spacing, ("linspace", "trailing"))
        if self.spacing == "trailing" and (self.double_shift or self.solver != "euler"):
            raise ValueError("sampling.spacing=trailing is for solver=euler with double_shift=false")
        _one_of("sampling.fusion", self.fusion, ("log", "uniform", "fixed", "none"))
        _one_of("sampling.indexing", self.indexing, ("exact", "released"))
        _at_least("sampling.steps", self.steps, 1)
        if len(self.native) != 2 or min(self.native) < 0:
            raise ValueError(f"sampling.native is {self.native}; give two weights of at least 0, as in (1, 1)")
        for name, levels in (("guided", self.guided), ("frame_guided", self.frame_guided)):
            if len(levels) != 2 or not 0 <= levels[0] <= levels[1] <= 1:
                raise ValueError(f"sampling.{name} is {levels}; give two noise levels in [0, 1], as in (0.2, 0.9)")
        _at_least("sampling.frame_scale", self.frame_scale, 1)
        _at_least("sampling.audio_attention", self.audio_attention, 0)
        _at_least("sampling.windows_per_batch", self.windows_per_batch, 1)
        if self.window_frames < 5 or self.window_frames % 4 != 1:
            raise ValueError(
                f"sampling.window_frames is {self.window_frames}; it must be 4n+1 and at least 5, as in 81"
            )
        latents = (self.window_frames - 1) // 4 + 1
        if self.overlap and not 2 <= self.overlap < latents:
            raise ValueError(
                f"sampling.overlap is {self.overlap}; a window of {self.window_frames} frames has {latents} latent "
                f"frames, so choose 0, or 2 to {latents - 1}"
            )

    @property
    def window_latents(self) -> int:
        return (self.window_frames - 1) // 4 + 1


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """The Kling-Avatar cascade.

    blueprint_scale: side of the blueprint as a fraction of the video's; blueprint_steps: its denoising steps
    search_seconds: how far around a cut a keyframe is looked for
    """

    blueprint_scale: float
    blueprint_steps: int
    search_seconds: float


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh's axes; one may be -1 and takes what is left.

    Clips and windows are spread over data and fsdp; weights lie whole on every device of data and in parts over fsdp, for
    networks that are larger than a device; context takes the tokens of a clip, tensor the heads.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. width, height: pixels, multiples of `grain`; text, image, speech: the three encoders.

    on_host: networks whose weights wait in the host's memory and come to the devices a layer at a time, each time they are
    used: the text encoder is larger than all others of the 1.3B's runs together, and is used once a video
    """

    name: str
    width: int
    height: int
    fps: int
    dit: DiTConfig
    vae: VAEConfig
    text: UMT5Config
    image: CLIPConfig
    speech: SpeechConfig
    negative_prompt: str
    sampling: SamplingConfig
    cascade: CascadeConfig
    mesh: MeshConfig = MeshConfig()
    on_host: tuple[str, ...] = ("text",)

    def __post_init__(self):
        for network in self.on_host:
            _one_of("a network of on_host", network, STACKED)
        for name, value in (("width", self.width), ("height", self.height)):
            if value <= 0 or value % self.grain:
                nearest = max(self.grain, round(value / self.grain) * self.grain)
                raise ValueError(f"{name} {value} is not a multiple of {self.grain}; the nearest is {nearest}")
        _at_least("fps", self.fps, 1)

    @property
    def grain(self) -> int:
        """Pixels per token of the transformer, each way; sizes are multiples of it."""
        return self.vae.side * max(self.dit.patch[1:])

    @property
    def memory_samples(self) -> int:
        """Samples before a window that the speech encoder hears too."""
        return self.speech.memory * SPEECH_TOKEN


def load_config(name: str) -> Config:
    """The Config that a function in a configs file returns.

    name: a file in `configs/` without its ending, or a path to a file; `config()` is called, or with "file:variant" the
    function of that name.
    """
    stem, _, function = name.rpartition(":") if ":" in name else (name, "", "config")
    path = Path(stem) if stem.endswith(".py") else next((f for f in config_files() if f.stem == stem), None)
    if path is None or not path.is_file():
        known = ", ".join(sorted(f.stem for f in config_files()))
        raise ValueError(f"there is no config {stem!r}; give one of {known}, or a path to a .py file")
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{path} has no function {function}()")
    return getattr(module, function)()


def config_files() -> list[Path]:
    """The configs that come with the package: beside it in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).parent
    return [f for folder in (package.parent / "configs", package / "configs") for f in folder.glob("[!_]*.py")]


def set_fields(config: Any, assignments: list[str]) -> Any:
    """A config with fields replaced: "sampling.steps=30". Values are Python literals, true and false; else a string."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment} has no '='; write --set sampling.steps=30")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False}.get(text, text)
        config = _replace(config, path.strip().split("."), value, assignment)
    return config


def _replace(config: Any, path: list[str], value: Any, assignment: str) -> Any:
    names = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    if path[0] not in names:
        near = difflib.get_close_matches(path[0], names, n=1) or names
        raise ValueError(
            f"--set {assignment}: there is no field {path[0]!r}; did you mean {', '.join(near) or 'none'}?"
        )
    old = getattr(config, path[0])
    if len(path) > 1:
        value = _replace(old, path[1:], value, assignment)
    elif isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    elif dataclasses.is_dataclass(old) or (old is not None and not isinstance(value, type(old))):
        raise ValueError(f"--set {assignment}: {path[0]} is a {type(old).__name__}, and {value!r} is not")
    return dataclasses.replace(config, **{path[0]: value})  # type: ignore[type-var]


def _one_of(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choice or repr('') for choice in choices)}")


def _at_least(name, value, least):
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
