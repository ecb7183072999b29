"""Words, faces and voices to features, with or without LoRA branches; what training runs of the three encoders.

params, lora: {component: parameters}, of which each function takes its own; without LoRA a component may be missing there.
"""

import jax.numpy as jnp

from kavatar_jax.config import Config
from kavatar_jax.media.text import PAD
from kavatar_jax.models import clip, umt5
from kavatar_jax.models.components import model_of
from kavatar_jax.types import Params


def read(params: Params, ids_BL, model: Config, *, lora: Params | None = None):
    """Token ids -> (B, L, D), zero rows after the last token."""
    variables = _variables("text", params, lora)
    return umt5.UMT5(model.text).apply(variables, ids_BL, ids_BL != PAD).astype(jnp.float32)


def see(params: Params, pixels_BHWC, model: Config, *, lora: Params | None = None):
    """Preprocessed pictures -> (B, L, D) tokens."""
    return clip.CLIP(model.image).apply(_variables("image", params, lora), pixels_BHWC).tokens.astype(jnp.float32)


def listen(params: Params, samples_BS, model: Config, *, lora: Params | None = None):
    """Normalised recordings of equal length -> (B, L, D)."""
    variables = _variables("speech", params, lora)
    encoder = model_of("speech", model.speech)
    return encoder.listen(variables["params"], samples_BS, model.speech, lora=variables["lora"])


def _variables(component: str, params: Params, lora: Params | None) -> dict[str, Params]:
    return {"params": params[component], "lora": (lora or {}).get(component, {})}
