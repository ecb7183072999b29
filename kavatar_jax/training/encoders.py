"""Words, faces and voices to features, with or without LoRA branches; what training runs of the three encoders."""

import jax.numpy as jnp

from kavatar_jax.config import CLIPConfig, SpeechConfig, UMT5Config
from kavatar_jax.media.text import PAD
from kavatar_jax.models import clip, speech, umt5
from kavatar_jax.types import Params


def read(params: Params, ids_BL, config: UMT5Config, *, lora: Params | None = None):
    """Token ids -> (B, L, D), zero rows after the last token."""
    return umt5.UMT5(config).apply({"params": params, "lora": lora or {}}, ids_BL, ids_BL != PAD).astype(jnp.float32)


def see(params: Params, pixels_BHWC, config: CLIPConfig, *, lora: Params | None = None):
    """Preprocessed pictures -> (B, L, D) tokens."""
    return clip.CLIP(config).apply({"params": params, "lora": lora or {}}, pixels_BHWC).tokens.astype(jnp.float32)


def listen(params: Params, samples_BS, config: SpeechConfig, *, lora: Params | None = None):
    """Normalised recordings of equal length -> (B, L, D)."""
    return speech.kind(config).listen(params, samples_BS, config, lora=lora)
