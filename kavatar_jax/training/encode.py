"""From recorded clips to the Batch that the transformer's step takes; the networks that do not learn run here."""

import jax
import jax.numpy as jnp

from kavatar_jax.config import Config
from kavatar_jax.models import vae
from kavatar_jax.models.dit import MASK_CHANNELS, frames_held
from kavatar_jax.parallel.sharding import constrain
from kavatar_jax.training import encoders
from kavatar_jax.training.data import Clips
from kavatar_jax.training.objective import Batch, resize_masks
from kavatar_jax.types import Params


def encode(params: Params, clips: Clips, model: Config, *, masks: str, live: frozenset[str]) -> Batch:
    """Latents of the clips and of what is given of them, and what they say and show; traceable.

    params: by component; masks: as ObjectiveConfig; live: encoders that learn, whose input is passed on as it is
    """
    video, shown = to_signed(clips.video), show(clips, held=frames_held(model.dit))
    # one program for both, one after the other
    latents, condition = jax.lax.map(lambda x: _moments(params["vae"], x, model), jnp.stack([video, shown]))
    size = latents.shape[1:4]
    text, image, speech = clips.ids, clips.pixels, clips.samples
    if "text" not in live:
        text = encoders.read(params, text, model)
    if image is not None and "image" not in live:
        image = encoders.see(params, image, model)
    if speech is not None and "speech" not in live:
        speech = encoders.listen(params, speech, model)
    return Batch(
        latents=latents,
        condition=condition,
        given=given_frames(clips.last, size[0]),
        face=resize_masks(clips.face / 255, size, masks),
        lip=resize_masks(clips.lip / 255, size, masks),
        text=text,
        image=image,
        speech=speech,
        director=clips.director,
    )


def to_signed(pixels):
    """uint8 -> float32 in [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def show(clips: Clips, held: int):
    """The clips as far as they are given, in [-1, 1]: the reference first, for some a later frame, grey elsewhere.

    held: how many frames, up to and with it, show the later one
    """
    assert clips.last is not None
    video, last = to_signed(clips.video), clips.last[:, None]
    number = jnp.arange(video.shape[1])
    later = (last > 0) & (number > last - held) & (number <= last)
    shown = jnp.where(later[..., None, None, None], video[jnp.arange(len(video)), clips.last][:, None], 0.0)
    return shown.at[:, 0].set(to_signed(clips.reference))


def given_frames(last_B, frames: int):
    """(B, T, 4): the first frame counts for all four of its latent."""
    given = jnp.zeros((last_B.shape[0], MASK_CHANNELS * frames)).at[:, :MASK_CHANNELS].set(1)
    given = given.at[jnp.arange(last_B.shape[0]), last_B + MASK_CHANNELS - 1].set(1)
    return given.reshape(-1, frames, MASK_CHANNELS)


def _moments(params: Params, video_BFHWC, model: Config):
    video_BFHWC = constrain(video_BFHWC, "batch", None, None, None, None)
    return jnp.concatenate(vae.encode(params, video_BFHWC, model.vae), axis=-1)
