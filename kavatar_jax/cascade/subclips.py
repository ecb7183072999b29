"""Every sub-clip between two keyframes at once, at the size of the video: clips are the batch axis."""

import numpy as np

from kavatar_jax.cascade.blueprint import share
from kavatar_jax.cascade.denoise import Denoise, Told, denoise, draw_noise, group_size
from kavatar_jax.cascade.encode import shot_at
from kavatar_jax.cascade.hear import hear, spans_of_frames
from kavatar_jax.cascade.weights import Weights
from kavatar_jax.config import Config
from kavatar_jax.diffusion.windows import Windows, slot_bucket
from kavatar_jax.types import Clips, Conditions, Keyframes, Report


def render_subclips(
    keyframes: Keyframes, conditions: Conditions, weights: Weights, config: Config, report: Report,
    denoise: Denoise = denoise,
) -> Clips:  # fmt: skip
    """Clips of one window each, first and last frame given; what a shorter clip has past its last frame is not kept."""
    sampling, cuts = config.sampling, np.array(keyframes.cuts)
    starts, lengths = cuts[:-1], np.diff(cuts)
    slots = slot_bucket(len(starts), multiple=group_size(len(starts), sampling))
    # windows that do not touch: the same step as for overlapping ones, with nothing to fuse
    length = sampling.window_latents
    windows = Windows(total=length * len(starts), length=length, stride=length, slots=slots)
    clips = np.minimum(np.arange(slots), len(starts) - 1)  # empty slots repeat the last clip

    speech, slices = hear(
        conditions.speech, spans_of_frames(starts[clips], config.fps, sampling), weights.speech, config
    )
    seconds = np.stack([starts, cuts[1:]], axis=1) / config.fps
    shots = [shot_at(conditions, *seconds[clip]) for clip in clips]
    views = [{0: keyframes.images[i], int(n): keyframes.images[i + 1]} for i, n in enumerate(lengths)]
    told = Told(
        speech=speech,
        slices=slices,
        prompt=conditions.prompts[shots],
        negative=conditions.negatives[shots],
        view=clips.astype(np.int32),
        frames=None,
    )
    shared = share(conditions, views, weights, config)
    seed = conditions.seed + 1  # other noise than the blueprint's
    latents = denoise(
        weights.dit, draw_noise(seed, windows, config), told, shared, windows, config.dit, sampling,
        stage="rendering sub-clips", report=report,
    )  # fmt: skip
    return Clips(latents=latents[: len(starts)], lengths=tuple(int(n) // 4 + 1 for n in lengths))
