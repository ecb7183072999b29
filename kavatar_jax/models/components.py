"""The networks of a weights directory, by the name of their folder."""

import functools
from types import ModuleType
from typing import NamedTuple

import jax

from kavatar_jax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from kavatar_jax.models import clip, dit, speech, umt5, vae
from kavatar_jax.types import Params


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
    "speech": Component(speech.KINDS, "the speech encoder"),
}


@functools.cache
def abstract(component: str, config) -> Params:
    """Shapes and dtypes of a component's parameters, nothing computed. Shared between callers: not to be changed."""
    model = model_of(component, config)
    return jax.eval_shape(lambda key: model.init(config, key), jax.random.key(0))


def model_of(component: str, config) -> ModuleType:
    """The model file that a component with this config is made by."""
    return COMPONENTS[component].kinds[type(config)]
