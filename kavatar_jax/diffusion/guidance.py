"""Guidance as a weighted sum of velocities: which branches the model runs, and the weight of each.

Every guidance rule of the field is linear in its branches, so a rule is a list of (what the branch is told, weight).
"""

from typing import NamedTuple

import jax.numpy as jnp

from kavatar_jax.config import SamplingConfig


class Branch(NamedTuple):
    """What one forward pass is told. positive: the prompt, else the negative prompt; heard: the refined audio reaches it;
    silent: that audio is refined from features that are zero, as where speech is dropped in training; worn: it is shown the
    pictures as if they had suffered (media/wear); audio_gain: what its attention to audio is multiplied by."""

    positive: bool
    heard: bool
    weight: float
    silent: bool = False
    worn: bool = False
    audio_gain: float = 1.0


def branches_of(sampling: SamplingConfig, sigma: float = 1.0) -> tuple[Branch, ...]:
    """The rule that a run's config asks for at a noise level.

    Limits of the levels at which there is guidance: Kynkaanniemi et al., arXiv 2404.07724. Raised attention to audio is no
    guidance: it holds in every branch and at every level.
    """
    branches = text_and_audio(1.0, 1.0)
    if sampling.guided[0] <= sigma <= sampling.guided[1]:
        scales = sampling.text_scale, sampling.audio_scale
        branches = audio_native(*sampling.native) if any(sampling.native) else text_and_audio(*scales)
        if sampling.frame_guided[0] <= sigma <= sampling.frame_guided[1]:
            branches = negative_frame(branches, sampling.frame_scale)
    return tuple(branch._replace(audio_gain=sampling.audio_attention) for branch in branches)


def text_and_audio(text_scale: float, audio_scale: float) -> tuple[Branch, ...]:
    """StableAvatar's three branches: v = U + audio_scale (A - U) + text_scale (P - A), without those of weight zero.

    U hears nothing and reads the negative prompt, A hears the speech, P also reads the prompt.
    """
    return _sum(
        Branch(positive=False, heard=False, weight=1 - audio_scale),
        Branch(positive=False, heard=True, weight=audio_scale - text_scale),
        Branch(positive=True, heard=True, weight=text_scale),
    )


def audio_native(speech_weight: float, refined_weight: float) -> tuple[Branch, ...]:
    """Audio native guidance: v = (1 + w1 + w2) V - w1 S - w2 N, in which the prompt is always read.

    V hears the speech; S the adapter's rendering of no speech, as the joint distribution of video and refined audio without
    its condition; N no refined audio at all. Source: StableAvatar, arXiv 2508.08248, section 3.2, which gives no weights and
    whose release does not have it: what stands for the two absences is our reading.
    """
    return _sum(
        Branch(positive=True, heard=True, weight=1 + speech_weight + refined_weight),
        Branch(positive=True, heard=True, weight=-speech_weight, silent=True),
        Branch(positive=True, heard=False, weight=-refined_weight),
    )


def negative_frame(branches: tuple[Branch, ...], frame_scale: float) -> tuple[Branch, ...]:
    """Another rule and away from a worn portrait: v + (frame_scale - 1) (P - W), the same rule where the scale is 1.

    P is told everything, W the same but for its pictures, which are worn. Source: Kling-Avatar, arXiv 2509.09595, section
    2.4, which gives neither a scale nor how this goes together with other guidance: that they add up is our reading.
    """
    plain = Branch(positive=True, heard=True, weight=frame_scale - 1)
    return _sum(*branches, plain, plain._replace(worn=True, weight=1 - frame_scale))


def combine(velocities, branches: tuple[Branch, ...]):
    """The guided velocity; `velocities` has the branches on its first axis."""
    weights = jnp.asarray([branch.weight for branch in branches], velocities.dtype)
    return jnp.tensordot(weights, velocities, axes=1)


def _sum(*terms: Branch) -> tuple[Branch, ...]:
    """Terms that are told the same as one branch; none of weight zero."""
    weights: dict[Branch, float] = {}
    for term in terms:
        told = term._replace(weight=0.0)
        weights[told] = weights.get(told, 0.0) + term.weight
    return tuple(told._replace(weight=weight) for told, weight in weights.items() if weight != 0)
