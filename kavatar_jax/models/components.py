"""The networks of a weights directory, by the name of their folder."""

import functools
from types import ModuleType
from typing import NamedTuple

import jax

from kavatar_jax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig, Wav2Vec2Config
from kavatar_jax.models import clip, dit, umt5, vae, wav2vec2
from kavatar_jax.types import Params


class Component(NamedTuple):
    """A model file (init, AXES, TORCH, UNUSED, config_of), its config class, and what it is for."""

    model: ModuleType
    config: type
    role: str


COMPONENTS = {
    "dit": Component(dit, DiTConfig, "the diffusion transformer"),
    "vae": Component(vae, VAEConfig, "the video autoencoder"),
    "text": Component(umt5, UMT5Config, "the text encoder"),
    "image": Component(clip, CLIPConfig, "the portrait encoder"),
    "speech": Component(wav2vec2, Wav2Vec2Config, "the speech encoder"),
}


@functools.cache
def abstract(component: str, config) -> Params:
    """Shapes and dtypes of a component's parameters, nothing computed. Shared between callers: not to be changed."""
    model = COMPONENTS[component].model
    return jax.eval_shape(lambda key: model.init(config, key), jax.random.key(0))
