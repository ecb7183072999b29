"""The networks a run needs, from a weights directory onto the mesh."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from kavatar_jax.checkpoint.lora import Changes, parse, read_loras
from kavatar_jax.checkpoint.weights import NO_CHANGES, load_component
from kavatar_jax.config import Config, DiTConfig
from kavatar_jax.media.text import ByteTokenizer, load_tokenizer
from kavatar_jax.models import names
from kavatar_jax.models.components import COMPONENTS, abstract, model_of, read_stored
from kavatar_jax.parallel.mesh import current
from kavatar_jax.parallel.sharding import described, partition
from kavatar_jax.types import Params

PARTS = ("config.json", "model.safetensors")
SOURCES = {  # which released file each part of a weights directory is converted from
    "dit": "StableAvatar-1.3B/transformer3d-square.pt or transformer3d-rec-vec.pt",
    "vae": "Wan2.1-Fun-V1.1-1.3B-InP/Wan2.1_VAE.pth",
    "text": "Wan2.1-Fun-V1.1-1.3B-InP/models_t5_umt5-xxl-enc-bf16.pth",
    "image": "Wan2.1-Fun-V1.1-1.3B-InP/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "speech": "wav2vec2-base-960h/",
    "tokenizer": "Wan2.1-Fun-V1.1-1.3B-InP/google/umt5-xxl/",
}
PLAIN_SOURCES = {  # the same of a transformer that hears nothing
    "dit": "diffusion_pytorch_model.safetensors or its shards",
    "vae": "Wan2.1_VAE.pth",
    "text": "models_t5_umt5-xxl-enc-bf16.pth",
    "image": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "tokenizer": "google/umt5-xxl/",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Parameters of each network, and the tokenizer: (texts, length) -> ids and mask, both (n, length).

    image, speech: empty where the transformer has no use for the encoder
    """

    dit: Params
    vae: Params
    text: Params
    tokenizer: Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]
    image: Params = dataclasses.field(default_factory=dict)
    speech: Params = dataclasses.field(default_factory=dict)


def read_configs(folder: Path, config: Config) -> Config:
    """The run's config with the networks as the weights directory describes them; how they are run stays the run's.

    ValueError if a part is missing, described by another version, or not made for the others, and if a run in which
    somebody speaks is given a transformer that does not listen.
    """
    dit = read_stored(folder, "dit", config.dit) if _is_there(folder, "dit") else config.dit
    if config.dit.audio is not None and (dit.audio is None or dit.in_channels == dit.out_channels):
        raise ValueError(
            f"{folder / 'dit'} does not listen to speech or does not see a portrait; it needs {SOURCES['dit']}"
        )
    check_complete(folder, dit)
    found = {name: read_stored(folder, name, getattr(config, name)) for name in parts_of(dit)}
    read = dataclasses.replace(config, **found)
    _check_fit(folder, read)
    return read


def alike(folder: Path, config: Config) -> bool:
    """Whether the weights directory's transformer works on latents such as the config's."""
    return _is_there(folder, "dit") and read_stored(folder, "dit", config.dit).out_channels == config.dit.out_channels


def load_weights(folder: Path, config: Config, *, changes: Changes = NO_CHANGES) -> Weights:
    """Read every network onto the current mesh, sharded by its AXES; changes: added to the transformer."""
    check_complete(folder, config.dit)
    loaded = {}
    for name, wanted in describe_networks(config).items():
        added = changes if name == "dit" else NO_CHANGES
        places = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        loaded[name] = load_component(folder / name, wanted, places, changes=added)
    return Weights(**loaded, tokenizer=load_tokenizer(folder / "tokenizer"))


def describe_weights(folder: Path | None, config: Config) -> Weights:
    """What load_weights would give on the current mesh, as shapes and places, with nothing in them."""
    tokenizer = ByteTokenizer() if folder is None else load_tokenizer(folder / "tokenizer")
    return Weights(**describe_networks(config), tokenizer=tokenizer)


def read_lora_files(words: Sequence[str], config: DiTConfig, *, unused: str = "refuse") -> Changes:
    """What LoRA files, each FILE or FILE:SCALE, add to such a transformer. ValueError as lora.read_loras."""
    return read_loras(map(parse, words), names.LORA, abstract("dit", config), unused=unused)


def describe_networks(config: Config) -> dict[str, Params]:
    """Shapes and places of the weights of each network that a run needs, on the current mesh."""
    mesh, found = current(), {}
    for name in parts_of(config.dit):
        wanted, axes = abstract(name, getattr(config, name)), model_of(name, getattr(config, name)).AXES
        found[name] = described(wanted, partition(wanted, axes, mesh, on_host=name in config.on_host))
    return found


def draw_untrained(config: Config, seed: int, tokenizer) -> Weights:
    """Untrained networks of a config's sizes: kernels of unit gain, scales one, biases zero; drawn on the host, where
    it takes a moment, since compiling five initialisers takes a minute."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "bias":
            return np.zeros(leaf.shape, leaf.dtype)
        if name == "scale":
            return np.ones(leaf.shape, leaf.dtype)
        fan_in = np.prod(leaf.shape[-4:-1]) if name == "kernel" else leaf.shape[-1]
        return (rng.standard_normal(leaf.shape, np.float32) * fan_in**-0.5).astype(leaf.dtype)

    params = {
        name: jax.device_put(jax.tree_util.tree_map_with_path(draw, abstract(name, getattr(config, name))))
        for name in parts_of(config.dit)
    }
    return Weights(**params, tokenizer=tokenizer)


def parts_of(dit: DiTConfig | None = None) -> tuple[str, ...]:
    """The networks that a run needs beside such a transformer; all of them if somebody speaks."""
    if dit is None or dit.audio is not None:
        return tuple(COMPONENTS)
    return ("dit", "vae", "text") if dit.image_width is None else ("dit", "vae", "text", "image")


def check_complete(folder: Path, dit: DiTConfig | None = None) -> None:
    """ValueError that lists every part that is missing and the released file it comes from.

    dit: the transformer that the parts are for, if it is known; else all are wanted
    """
    if not folder.is_dir():
        raise ValueError(f"there is no weights directory {folder}; make one with tools/convert_checkpoint.py")
    sources = SOURCES if dit is None or dit.audio is not None else PLAIN_SOURCES
    there = {name: _is_there(folder, name) for name in parts_of(dit)}
    # a vocabulary, or the config.json of a tokenizer that needs none
    there["tokenizer"] = any((folder / "tokenizer" / part).is_file() for part in ("tokenizer.json", "config.json"))
    missing = [f"{name} (from {sources[name]})" for name in there if not there[name]]
    if missing:
        raise ValueError(
            f"the weights directory {folder} is incomplete; missing: {', '.join(missing)}. Fetch the released files and run "
            f"tools/convert_checkpoint.py SRC {folder} --only {' '.join(name for name in there if not there[name])}"
        )


def _is_there(folder: Path, name: str) -> bool:
    return all((folder / name / part).is_file() for part in PARTS)


def _check_fit(folder: Path, config: Config) -> None:
    """What the transformer expects of the encoders is what they give."""
    pairs = {"text": (config.dit.text_width, config.text.width)}
    if config.dit.audio is not None:
        pairs["speech"] = (config.dit.audio.speech_width, config.speech.width)
    if config.dit.image_width is not None:
        pairs["image"] = (config.dit.image_width, config.image.width)
    odd = [f"{name} of width {given}, expected {wanted}" for name, (wanted, given) in pairs.items() if wanted != given]
    if odd:
        raise ValueError(f"the parts of {folder} were not made for each other: {', '.join(odd)} by {folder / 'dit'}")
