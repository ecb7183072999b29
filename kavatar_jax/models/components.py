"""The networks of a weights directory, by the name of their folder.

A speech encoder's file has more than the others: `listen(params, samples_BS, config, *, lora)` -> (B, L, width), a vector
per 20 ms but for the first config.memory of them; `normalise(samples)`, which prepares a recording of any length on the
host; and `token_count(samples, config)`, how many vectors come of so many samples where nothing is left out.
"""

import dataclasses
import functools
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax

from kavatar_jax.checkpoint.weights import read_config
from kavatar_jax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig, Wav2Vec2Config, WhisperConfig
from kavatar_jax.models import clip, dit, umt5, vae, wav2vec2, whisper
from kavatar_jax.types import Params

RUN_FIELDS = ("dtype", "param_dtype", "remat", "quantised")  # of a network's config: how it is run, not what it is


class Component(NamedTuple):
    """A model file (init, AXES, TORCH, UNUSED, config_of) for each class of config, the published one first, and a role."""

    kinds: dict[type, ModuleType]
    role: str

    @property
    def model(self) -> ModuleType:
        """The published one's file."""
        return next(iter(self.kinds.values()))


COMPONENTS = {
    "dit": Component({DiTConfig: dit}, "the diffusion transformer"),
    "vae": Component({VAEConfig: vae}, "the video autoencoder"),
    "text": Component({UMT5Config: umt5}, "the text encoder"),
    "image": Component({CLIPConfig: clip}, "the portrait encoder"),
    "speech": Component({Wav2Vec2Config: wav2vec2, WhisperConfig: whisper}, "the speech encoder"),
}


@functools.cache
def abstract(component: str, config) -> Params:
    """Shapes and dtypes of a component's parameters, nothing computed. Shared between callers: not to be changed."""
    model = model_of(component, config)
    # the key is not made, which devices that are not there could not
    return jax.eval_shape(lambda: model.init(config, jax.random.key(0)))


def model_of(component: str, config) -> ModuleType:
    """The model file that a component with this config is made by."""
    return COMPONENTS[component].kinds[type(config)]


def read_stored(folder: Path, component: str, mine):
    """The network's config as the weights directory describes it; how it is run stays as `mine` says."""
    stored = read_config(folder / component, *COMPONENTS[component].kinds)
    fields = {field.name for field in dataclasses.fields(stored)}.intersection(RUN_FIELDS)
    return dataclasses.replace(stored, **{field: getattr(mine, field) for field in fields})
