"""A plain video, in which nobody speaks: words, and how it begins and ends where that is given, to latents in one window.

Source: Wan-Video/Wan2.1, wan/text2video.py, wan/image2video.py and wan/first_last_frame2video.py.
"""

import jax.numpy as jnp
import numpy as np

from kavatar_jax.cascade.blueprint import View, see, wear_down
from kavatar_jax.cascade.denoise import Denoise, Pictures, Shared, Told, denoise, draw_noise, group_size
from kavatar_jax.cascade.encode import encode_texts, look_at
from kavatar_jax.cascade.weights import Weights
from kavatar_jax.config import Config, DiTConfig
from kavatar_jax.diffusion.windows import Windows
from kavatar_jax.media.text import clean_like_wan
from kavatar_jax.types import Blueprint, Report, Scene


def draw_film(scene: Scene, weights: Weights, config: Config, report: Report, denoise: Denoise = denoise) -> Blueprint:
    """A video of sampling.window_frames frames of config.width x config.height."""
    windows, told, shared = tell_scene(scene, weights, config, report)
    latents = denoise(
        weights.dit, draw_noise(scene.seed, windows, config), told, shared, windows, config.dit, config.sampling,
        stage="filming", report=report,
    )  # fmt: skip
    frames = config.sampling.window_frames
    return Blueprint(latents=windows.join(latents), frames=frames, width=config.width, height=config.height)


def tell_scene(scene: Scene, weights: Weights, config: Config, report: Report) -> tuple[Windows, Told, Shared]:
    """What the one window reads and sees. Where the mesh has more slots for windows, they repeat it."""
    sampling = config.sampling
    length = sampling.window_latents
    windows = Windows(total=length, length=length, stride=length, slots=group_size(1, sampling))
    words = [clean_like_wan(text) for text in (scene.instruction, config.negative_prompt)]
    texts = encode_texts(words, weights, config, report)
    first = np.zeros(windows.slots, np.int32)
    told = Told(speech=None, slices=None, prompt=first, negative=first + 1, view=first, frames=None)
    frames = {0: scene.first, sampling.window_frames - 1: scene.last}
    given = {number: image for number, image in frames.items() if image is not None}
    pictures = _show(given, weights, config)
    worn = _show(wear_down(given), weights, config) if sampling.frame_scale != 1 else None
    return windows, told, Shared(texts, pictures.image, pictures.condition, director=None, worn=worn)


def pictures_wanted(config: DiTConfig) -> int:
    """How many pictures a transformer that hears nothing was made to begin from: none, the first, or the last as well."""
    if config.in_channels == config.out_channels:
        return 0
    return 2 if config.image_positions else 1


def _show(given: View, weights: Weights, config: Config) -> Pictures:
    tokens = None
    if config.dit.image_width is not None:
        tokens = jnp.concatenate([look_at(image, weights, config).tokens for image in given.values()], axis=1)
    return Pictures(tokens, see([given], weights, config) if given else None)
