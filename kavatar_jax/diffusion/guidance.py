"""Guidance as a weighted sum of velocities: which branches the model runs, and the weight of each.

Every guidance rule of the field is linear in its branches, so a rule is a list of (what the branch is told, weight).
"""

from typing import NamedTuple

import jax.numpy as jnp


class Branch(NamedTuple):
    """What one forward pass is told. positive: the prompt, else the negative prompt; heard: the refined audio reaches it."""

    positive: bool
    heard: bool
    weight: float


def text_and_audio(text_scale: float, audio_scale: float) -> tuple[Branch, ...]:
    """StableAvatar's three branches: v = U + audio_scale (A - U) + text_scale (P - A), without those of weight zero.

    U hears nothing and reads the negative prompt, A hears the speech, P also reads the prompt.
    """
    branches = (
        Branch(positive=False, heard=False, weight=1 - audio_scale),
        Branch(positive=False, heard=True, weight=audio_scale - text_scale),
        Branch(positive=True, heard=True, weight=text_scale),
    )
    return tuple(branch for branch in branches if branch.weight != 0)


def combine(velocities, branches: tuple[Branch, ...]):
    """The guided velocity; `velocities` has the branches on its first axis."""
    weights = jnp.asarray([branch.weight for branch in branches], velocities.dtype)
    return jnp.tensordot(weights, velocities, axes=1)
