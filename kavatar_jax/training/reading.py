"""What a text encoder can learn by itself in the known-answer world: which emotion, actions and camera a prompt asks for.

The mean of its features carries the answers on its first axes, one each, so nothing is learnt that the transformer would
not see. A few minutes of this spare it from learning to read by way of pixels.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from kavatar_jax.config import Config
from kavatar_jax.media.text import PAD, Tokenizer
from kavatar_jax.training import encoders
from kavatar_jax.training.sources import MEANINGS
from kavatar_jax.types import Params

SHARPNESS = 8.0  # logits for features of size one


class Prompts(NamedTuple):
    """ids: (B, L) tokens; meant: (B, M) 1 for what is asked for."""

    ids: Any
    meant: Any


def prompt_row(record: dict[str, Any], portrait: bool, last: int, *, tokenizer: Tokenizer, length: int) -> Prompts:
    return Prompts(ids=tokenizer([record["prompt"]], length)[0][0], meant=record["meant"])


def losses(params: Params, prompts: Prompts, model: Config):
    """Per prompt, each (B,): the cross entropy of its meanings, and whether all of them were understood."""
    features = encoders.read(params, prompts.ids, model)
    real = (prompts.ids != PAD)[..., None]
    mean = jnp.sum(features * real, axis=1) / jnp.maximum(real.sum(axis=1), 1)
    logits = SHARPNESS * mean[:, : len(MEANINGS)]
    entropy = optax.sigmoid_binary_cross_entropy(logits, prompts.meant).sum(axis=-1)
    understood = ((logits > 0) == (prompts.meant > 0.5)).all(axis=-1)
    return {"loss": entropy, "understood": understood.astype(jnp.float32)}
