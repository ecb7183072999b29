"""What the video autoencoder learns: clips in, a loss per clip out.

|error| of the pixels, more of it in faces and mouths, of their differences in time, and the posterior's divergence from a
normal (Kingma and Welling, arXiv 1312.6114). A mouth is a handful of latents: without its weight a small autoencoder
blurs away the very thing that has to be heard. Noise on what is decoded stands for what a transformer will get wrong (as
in representation autoencoders, arXiv 2510.11690).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.config import VAEConfig
from kavatar_jax.models import vae
from kavatar_jax.training.config import ReconstructionConfig, latent_size
from kavatar_jax.training.data import Clips
from kavatar_jax.types import Params


class Draws(NamedTuple):
    """posterior: (B, T, h, w, C) normal noise for each latent; noise: the same, to be decoded with the latents, times
    `level`, (B,) uniform between 0 and 1."""

    posterior: jax.Array
    noise: jax.Array
    level: jax.Array


def draw(key, clips: Clips, config: VAEConfig) -> Draws:
    B, F, H, W, _ = clips.video.shape
    shape = (B, *latent_size(F, H, W, config), config.latent_channels)
    first, second, third = jax.random.split(key, 3)
    return Draws(jax.random.normal(first, shape), jax.random.normal(second, shape), jax.random.uniform(third, (B,)))


def losses(
    params: Params, clips: Clips, draws: Draws, model: VAEConfig, config: ReconstructionConfig
) -> dict[str, jax.Array]:
    """Per clip, each (B,): loss, and the parts of it without their weights, that inside the lips apart."""
    video = clips.video.astype(jnp.float32) / 127.5 - 1
    mean, logvar = vae.encode(params, video, model, chunk=config.chunk)
    latents = mean + config.spread * jnp.exp(0.5 * logvar) * draws.posterior / np.float32(model.latent_std)
    latents = latents + config.noise * draws.level[:, None, None, None, None] * draws.noise
    made = vae.decode(params, latents, model, chunk=config.chunk)

    face, lip = (mask.astype(jnp.float32) / 255 for mask in (clips.face, clips.lip))
    weight = (1 + (config.face_weight - 1) * face) * (1 + (config.lip_weight - 1) * lip)
    error = jnp.abs(made - video).mean(axis=-1)
    kl = divergence(mean * np.float32(model.latent_std) + np.float32(model.latent_mean), logvar)
    loss = _mean(error * weight) + config.kl * kl
    if config.motion and video.shape[1] > 1:
        motion = jnp.abs(jnp.diff(made, axis=1) - jnp.diff(video, axis=1)).mean(axis=-1)
        loss = loss + config.motion * _mean(motion * weight[:, 1:])
    lip_error = (error * lip).sum(axis=(1, 2, 3)) / jnp.maximum(lip.sum(axis=(1, 2, 3)), 1)
    return {"loss": loss, "error": _mean(error), "lip_error": lip_error, "kl": kl}


def divergence(mean, logvar):
    """KL of a diagonal normal from the standard one, a mean over latents: (B,)."""
    return _mean(0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar))


def reconstruct(params: Params, video_BFHWC, model: VAEConfig):
    """uint8 clips there and back through the mode of the posterior, as uint8."""
    mean, _ = vae.encode(params, video_BFHWC.astype(jnp.float32) / 127.5 - 1, model)
    return to_pixels(vae.decode(params, mean, model))


def latent_moments(params: Params, video_BFHWC, model: VAEConfig):
    """Mean and mean square of each channel of the latents of uint8 clips, before they are normalised: (2, C)."""
    mean, _ = vae.encode(params, video_BFHWC.astype(jnp.float32) / 127.5 - 1, model)
    raw = mean * np.float32(model.latent_std) + np.float32(model.latent_mean)
    return jnp.stack([raw.mean(axis=(0, 1, 2, 3)), jnp.square(raw).mean(axis=(0, 1, 2, 3))])


def to_pixels(video):
    """About [-1, 1] -> uint8."""
    return jnp.round(jnp.clip(video / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def _mean(x):
    return x.mean(axis=tuple(range(1, x.ndim)))
