"""The flow-matching objective of the transformer: a batch of clips and random draws in, a loss per clip out.

Velocity loss weighted by face and lip masks and a term for motion (StableAvatar, arXiv 2508.08248, equation 11, and its
train_1B_square.py); dropout of what the model is told; a weight on the mouth (Kling-Avatar, arXiv 2509.09595, 2.4).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.config import Config
from kavatar_jax.diffusion.flow import TRAIN_STEPS, add_noise, target_velocity, time_shift
from kavatar_jax.models.audio_adapter import slice_table
from kavatar_jax.models.dit import DiT, Inputs
from kavatar_jax.training import encoders
from kavatar_jax.training.config import ObjectiveConfig

PIECES = (0.4, 0.5)  # where the random draw passes from both masks to the face's, and on to the lips'


class Batch(NamedTuple):
    """Clips as the transformer's trainer takes them; a field that the model does not use is None.

    latents, condition: (B, T, h, w, 2 C) mean and log variance of the clip and of what is given of it, grey elsewhere
    given: (B, T, 4) which of a latent frame's four video frames are given; face, lip: (B, T, h, w) in [0, 1]
    text: (B, L, D), or token ids (B, L) where the encoder learns too
    image: (B, L, D), or pixels where that encoder learns; speech: (B, L, D), or samples (B, n) likewise
    director: (B, L, D)
    """

    latents: jax.Array
    condition: jax.Array
    given: jax.Array
    face: jax.Array
    lip: jax.Array
    text: jax.Array
    image: jax.Array | None = None
    speech: jax.Array | None = None
    director: jax.Array | None = None


class Draws(NamedTuple):
    """Everything random in a step, each with the clips first, so that a batch may be cut anywhere.

    sigma, gamma: (B,); noise, spread, spread_given: (B, T, h, w, C) normal; heard, read, seen: (B,) bool
    """

    sigma: jax.Array
    gamma: jax.Array
    noise: jax.Array
    spread: jax.Array
    spread_given: jax.Array
    heard: jax.Array
    read: jax.Array
    seen: jax.Array


def draw(key, batch: Batch, config: ObjectiveConfig) -> Draws:
    B, *grid, channels = batch.latents.shape
    shape = (B, *grid, channels // 2)
    keys = iter(jax.random.split(key, 8))
    return Draws(
        sigma=draw_sigmas(next(keys), B, config),
        gamma=jax.random.uniform(next(keys), (B,)),
        noise=jax.random.normal(next(keys), shape),
        spread=jax.random.normal(next(keys), shape),
        spread_given=jax.random.normal(next(keys), shape),
        heard=jax.random.bernoulli(next(keys), 1 - config.drop_audio, (B,)),
        read=jax.random.bernoulli(next(keys), 1 - config.drop_text, (B,)),
        seen=jax.random.bernoulli(next(keys), 1 - config.drop_image, (B,)),
    )


def draw_sigmas(key, count: int, config: ObjectiveConfig):
    """Noise levels in (0, 1], (count,): multiples of 1/1000 before the shift, as in the release."""
    if config.timesteps == "logit_normal":
        u = jax.nn.sigmoid(config.logit_mean + config.logit_std * jax.random.normal(key, (count,)))
    else:
        u = jax.random.uniform(key, (count,))
        u = (jnp.arange(count) + u) / count if config.stratified else u
    return time_shift((jnp.floor(u * TRAIN_STEPS).clip(0, TRAIN_STEPS - 1) + 1) / TRAIN_STEPS, config.shift)


def losses(
    params, lora, batch: Batch, blank, draws: Draws, model: Config, config: ObjectiveConfig, *, clip_level: bool
):
    """Per clip, each (B,): loss, sigma, and the error over the frame and over the lips without the weights of masks.

    params, lora: by component; those of "text", "image" and "speech" only where these learn too
    blank: what `batch.text` is of no words, (1, L, D) or (1, L)
    """
    dit, sigma = model.dit, draws.sigma[:, None, None, None, None]
    clean = sample_posterior(batch.latents, draws.spread, model.vae, config)
    noisy = add_noise(clean, draws.noise, sigma)
    inputs = _inputs(params, lora, batch, blank, draws, noisy, model, config)
    predicted = DiT(dit, clip_level).apply({"params": params["dit"], "lora": lora.get("dit", {})}, inputs).velocity
    target = target_velocity(clean, draws.noise)
    weight = loss_weight(draws.gamma, batch.face, batch.lip, config)
    # all ones where least_sigma is 0; else of velocities near no noise, where a clean prediction's are off without bound
    scale = jnp.square(draws.sigma / jnp.maximum(draws.sigma, config.least_sigma))
    error = jnp.mean(jnp.square(predicted - target), axis=-1) * _along(scale, predicted[..., 0])
    return {
        "loss": velocity_loss(predicted, target, weight, config) * scale,
        "sigma": draws.sigma,
        "error": error.mean(axis=(1, 2, 3)),
        "lip_error": (error * batch.lip).sum(axis=(1, 2, 3)) / jnp.maximum(batch.lip.sum(axis=(1, 2, 3)), 1e-6),
    }


def velocity_loss(predicted, target, weight_BTHWC, config: ObjectiveConfig):
    """Weighted square error of (B, T, H, W, C) velocities, a mean over all elements, and the motion term: (B,)."""
    difference = predicted - target
    masked = jnp.mean(jnp.square(difference) * weight_BTHWC, axis=(1, 2, 3, 4))
    if config.motion == "none":
        return masked
    motion = jnp.diff(difference * np.sqrt(_shares(config.channels)), axis=1 if config.motion == "frames" else 4)
    motion = jnp.mean(jnp.square(motion), axis=(1, 2, 3, 4)) if motion.size else jnp.zeros_like(masked)
    return (1 - config.motion_weight) * masked + config.motion_weight * motion


def loss_weight(gamma_B, face, lip, config: ObjectiveConfig):
    """The loss's weight, (B, T, H, W, C) or with C 1 where all channels are alike.

    Of the masks it is 1 + face + lip for gamma below 0.4, face below 0.5, lip from there on; of the channels
    config.channels, and config.lip_channels for what config.lip_weight adds in the lips.
    """
    weight = jnp.ones_like(face)
    if config.weighting == "piecewise":
        gamma = gamma_B[:, None, None, None]
        weight = jnp.where(gamma < PIECES[0], 1 + face + lip, jnp.where(gamma < PIECES[1], face, lip))
    more = (config.lip_weight - 1) * lip[..., None] * _shares(config.lip_channels or config.channels)
    return weight[..., None] * (_shares(config.channels) + more)


def _shares(channels: tuple[float, ...]) -> np.ndarray:
    """Weights of channels with a mean of one."""
    weights = np.array(channels or (1.0,), np.float32)
    return weights / weights.mean()


def build_condition(batch: Batch, draws: Draws, model: Config, config: ObjectiveConfig):
    """(B, T, h, w, 4 + C): the mask of what is given, and its latents."""
    return join_condition(batch.given, sample_posterior(batch.condition, draws.spread_given, model.vae, config))


def join_condition(given_BT4, latents):
    mask = jnp.broadcast_to(given_BT4[:, :, None, None], (*latents.shape[:4], 4))
    return jnp.concatenate([mask.astype(latents.dtype), latents], axis=-1)


def sample_posterior(moments, normal, vae, config: ObjectiveConfig):
    """Latents of a mean, normalised, and a log variance, which is not."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    if config.posterior == "mode":
        return mean
    spread = jnp.exp(0.5 * logvar) * normal
    return mean + (spread if config.posterior == "released" else spread / np.float32(vae.latent_std))


def resize_masks(masks_BFHW, size: tuple[int, int, int], kind: str):
    """(B, F, H, W) -> (B, T, h, w). "released": trilinear without antialiasing, align_corners false, evenly in time;
    "grouped": the mean of the pixels that a latent is made of, the first frame alone."""
    x = masks_BFHW.astype(jnp.float32)
    for axis, target in enumerate(size, start=1):
        time = axis == 1
        matrix = (
            linear_matrix(x.shape[axis], target) if kind == "released" else group_matrix(x.shape[axis], target, time)
        )
        x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(matrix), axes=(axis, 1)), -1, axis)
    return x


def linear_matrix(source: int, target: int) -> np.ndarray:
    """Linear interpolation with half-pixel centres, (target, source) float32."""
    places = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    low = np.floor(places).astype(int)
    matrix, rows = np.zeros((target, source)), np.arange(target)
    np.add.at(matrix, (rows, low), 1 - (places - low))
    np.add.at(matrix, (rows, np.minimum(low + 1, source - 1)), places - low)
    return matrix.astype(np.float32)


def group_matrix(source: int, target: int, first_alone: bool) -> np.ndarray:
    """Means of equal groups; with first_alone the first row is the first entry."""
    if first_alone and target > 1:
        matrix = np.zeros((target, source), np.float32)
        matrix[0, 0] = 1
        matrix[1:, 1:] = group_matrix(source - 1, target - 1, False)
        return matrix
    assert source % target == 0, f"{source} entries in {target} groups"
    return np.repeat(np.eye(target, dtype=np.float32), source // target, axis=1) * (target / source)


def _inputs(params, lora, batch: Batch, blank, draws: Draws, noisy, model: Config, config: ObjectiveConfig) -> Inputs:
    """What the transformer is told of each clip, less what is dropped; encoders that learn are run here."""
    c, image, speech, slices, heard = model.dit, batch.image, batch.speech, None, None
    text = jnp.where(_along(draws.read, batch.text), batch.text, blank)
    if text.ndim == 2:
        text = encoders.read(params, text, model, lora=lora)
    if image is not None:
        image = encoders.see(params, image, model, lora=lora) if image.ndim == 4 else image
        image = jnp.where(_along(draws.seen, image), image, 0)
    if speech is not None:
        if speech.ndim == 2:
            speech = encoders.listen(params, speech, model, lora=lora)
        slices = jnp.asarray(slice_table(speech.shape[1], 4 * (noisy.shape[1] - 1) + 1))
        slices = jnp.broadcast_to(slices, (speech.shape[0], *slices.shape))
        if config.silence == "features":
            speech = jnp.where(_along(draws.heard, speech), speech, 0)
        else:
            heard = draws.heard
    return Inputs(
        latents=noisy,
        timestep=draws.sigma * TRAIN_STEPS,
        text=text,
        condition=build_condition(batch, draws, model, config) if c.in_channels > c.out_channels else None,
        image=image,
        speech=speech,
        slices=slices,
        heard=heard,
        director=batch.director,
    )


def _along(flags_B, x):
    """Flags of clips, shaped to broadcast over the other axes of x."""
    return flags_B.reshape(-1, *(1,) * (x.ndim - 1))
