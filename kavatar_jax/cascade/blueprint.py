"""The whole performance in one go, through sliding windows; small in the cascade, full size in single mode."""

import dataclasses

import jax
import numpy as np

from kavatar_jax.cascade.denoise import Denoise, Pictures, Shared, Told, denoise, draw_noise, group_size
from kavatar_jax.cascade.encode import shot_at, to_signed
from kavatar_jax.cascade.hear import hear, plan_latents, spans_of_windows
from kavatar_jax.cascade.weights import Weights
from kavatar_jax.config import Config
from kavatar_jax.diffusion.windows import Windows, slot_bucket
from kavatar_jax.media.image import fit_size, resize
from kavatar_jax.media.wear import wear
from kavatar_jax.models import vae
from kavatar_jax.models.dit import frames_held
from kavatar_jax.models.vae_layers import layout
from kavatar_jax.parallel.mesh import current, picture_mesh
from kavatar_jax.parallel.programs import program
from kavatar_jax.parallel.sharding import constrain, place_of
from kavatar_jax.types import Blueprint, Conditions, Report

View = dict[int, np.ndarray]  # frame number -> the picture that is given there, (H, W, 3) uint8


def draw_blueprint(
    conditions: Conditions, weights: Weights, config: Config, report: Report, denoise: Denoise = denoise
) -> Blueprint:
    """The video at config.width x config.height: one batch of windows over the whole speech."""
    windows, told, shared = tell_windows(conditions, weights, config)
    latents = denoise(
        weights.dit, draw_noise(conditions.seed, windows, config), told, shared, windows, config.dit, config.sampling,
        stage="performing", report=report,
    )  # fmt: skip
    return Blueprint(latents=windows.join(latents), frames=conditions.frames, width=config.width, height=config.height)


def tell_windows(conditions: Conditions, weights: Weights, config: Config) -> tuple[Windows, Told, Shared]:
    """What each window of the whole speech hears, reads and sees."""
    sampling, samples = config.sampling, len(conditions.speech)
    windows = plan_windows(samples, config)
    spans = spans_of_windows(windows, samples, config.fps, sampling)
    told = tell(conditions, windows.starts, conditions.speech, spans, weights, config)
    if windows.short_end:
        told = told._replace(frames=np.maximum(windows.valid, 1).astype(np.int32))
    return windows, told, share(conditions, [{0: conditions.portrait}], weights, config)


def tell(
    conditions: Conditions, starts: np.ndarray, speech: np.ndarray, spans: np.ndarray, weights: Weights, config: Config
) -> Told:
    """What the windows from these latent frames on hear, each its span of `speech`, and read."""
    features, slices = hear(speech, spans, weights.speech, config)
    length = config.sampling.window_frames / config.fps
    shots = [shot_at(conditions, start, start + length) for start in 4 * starts / config.fps]
    return Told(
        speech=features,
        slices=slices,
        prompt=conditions.prompts[shots],
        negative=conditions.negatives[shots],
        view=np.zeros(len(starts), np.int32),
        frames=None,
    )


def share(conditions: Conditions, views: list[View], weights: Weights, config: Config) -> Shared:
    """What all windows of a performance read, and what they see of these views."""
    worn = None
    if conditions.worn_face is not None:
        worn = Pictures(conditions.worn_face, see([wear_down(view) for view in views], weights, config))
    return Shared(conditions.texts, conditions.face, see(views, weights, config), conditions.director, worn)


def wear_down(view: View) -> View:
    """Every picture worn, for the branch that guidance leads away from."""
    return {frame: wear(image) for frame, image in view.items()}


def at_blueprint_size(config: Config) -> Config:
    """The run's config for the cascade's first stage: smaller, fewer steps."""
    scale = config.cascade.blueprint_scale
    width, height = fit_size(round(config.width * scale), round(config.height * scale), config.grain)
    return dataclasses.replace(
        config,
        width=width,
        height=height,
        sampling=dataclasses.replace(config.sampling, steps=config.cascade.blueprint_steps),
    )


def plan_windows(samples: int, config: Config) -> Windows:
    """Windows over a whole recording, their number padded to one of few."""
    sampling = config.sampling
    _, total = plan_latents(samples, config.fps, sampling)
    windows = Windows(
        total=total,
        length=sampling.window_latents,
        stride=sampling.window_latents - sampling.overlap,
        slots=1,
        short_end=sampling.indexing == "released",
    )
    slots = slot_bucket(windows.count, multiple=group_size(windows.count, sampling))
    return dataclasses.replace(windows, slots=slots)


def see(views: list[View], weights: Weights, config: Config) -> np.ndarray:
    """What windows are shown: for each view, given images at given frames, (n, T, h, w, 4 + C) float32.

    Four channels of mask say which of a latent frame's four video frames are given; then come the latents of a video
    that is mid-grey elsewhere, or shows a later frame as long as `frames_held` says. Frame 0 counts for all four frames
    of the first latent.
    """
    frames, height, width = config.sampling.window_frames, config.height, config.width
    mesh = picture_mesh(current(), height, width)
    conditions = []
    for given in views:
        video = np.zeros((1, frames, height, width, 3), np.float32)
        mask = np.zeros(frames + 3, np.float32)
        for frame, image in given.items():
            first = max(frame + 1 - frames_held(config.dit), 1) if frame else 0
            video[0, first : frame + 1] = to_signed(resize(image, (width, height)))
            mask[frame + 3 if frame else slice(0, 4)] = 1
        with jax.set_mesh(mesh):
            placed = jax.device_put(video, place_of(video.shape, layout(1), mesh))
            latents = np.asarray(_encode(config.vae, weights.vae, placed)[0])
        mask = np.broadcast_to(mask.reshape(-1, 1, 1, 4), (*latents.shape[:3], 4))
        conditions.append(np.concatenate([mask, latents], axis=-1))
    return np.stack(conditions)


@program(static_argnums=0)
def _encode(config, params, video):
    mean, _ = vae.encode(params, video, config)
    return constrain(mean, None, None, None, None, None)
