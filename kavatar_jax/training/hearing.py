"""What a speech encoder can learn by itself in the known-answer world: the mouth that belongs to a voice.

Every vector carries on its first axes the mouth's opening and width, from two frames before its own to two after, so the
vector in the middle of a latent frame knows how the mouth moves all through it. Its other axes are to be zero: a transformer
would listen to what they happen to carry, which is another thing for every voice. As with `reading`, nothing is learnt that
the transformer would not see, and it need not learn to hear by way of pixels, which takes far longer.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kavatar_jax.config import Config
from kavatar_jax.models.components import model_of
from kavatar_jax.training import encoders
from kavatar_jax.types import Params

REACH = 2  # frames to either side
TYPICAL, SPREAD = (0.2, 0.0), (0.2, 0.2)  # of opening and width: features of size one stand for one spread
ANSWERS = len(SPREAD) * (2 * REACH + 1)


class Voices(NamedTuple):
    """samples: (B, n) normalised; mouth: (B, F, 2) opening and width."""

    samples: Any
    mouth: Any


def voice_row(record: dict[str, Any], portrait: bool, last: int, *, model: Config) -> Voices:
    return Voices(samples=model_of("speech", model.speech).normalise(record["samples"]), mouth=record["mouth"])


def losses(params: Params, voices: Voices, model: Config):
    """Per clip, each (B,): `loss`, the mean squared error of its answers, in spreads, and `surplus`; `opening`, the error of
    the frames' own openings; `surplus`, the squares of what is no answer, over the number of answers.
    """
    features = encoders.listen(params, voices.samples, model)
    tokens, frames = features.shape[1], voices.mouth.shape[1]
    own = np.arange(tokens) * frames // tokens  # the frame in which a vector's time begins
    places = own[:, None] + np.arange(-REACH, REACH + 1)
    mouth = (voices.mouth - jnp.asarray(TYPICAL)) / jnp.asarray(SPREAD)
    wanted = mouth[:, places.clip(0, frames - 1)]  # (B, tokens, places, 2)
    told = features[..., :ANSWERS].reshape(wanted.shape)
    inside = ((places >= 0) & (places < frames))[..., None]
    error = jnp.square(told - wanted) * inside
    surplus = jnp.square(features[..., ANSWERS:]).sum(axis=2).mean(axis=1) / ANSWERS
    return {
        "loss": error.sum(axis=(1, 2, 3)) / (inside.sum() * len(SPREAD)) + surplus,
        "opening": error[:, :, REACH, 0].mean(axis=1),
        "surplus": surplus,
    }
