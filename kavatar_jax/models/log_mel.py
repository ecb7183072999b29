"""Log-mel energies as speech features: a 16 kHz recording comes in, one vector per 20 ms goes out; nothing is learnt.

For models that have no pretrained speech encoder. Each vector holds its own energies, those of its neighbours, and where
it stands in the recording, as sinusoids: the audio adapter takes the vectors of a latent frame as a set, and what a
transformer's features carry of their order has to be said here in so many numbers.
"""

import functools
import math

import jax.numpy as jnp
import librosa
import numpy as np

from kavatar_jax.config import LogMelConfig
from kavatar_jax.types import SAMPLE_RATE, Params

HOP = 320  # samples, 20 ms: two vectors per frame at 25 frames a second
WINDOW = 640
FLOOR = 1e-7  # added to energies; a quarter of those of puppets' voices, pauses among them, lie below it
CENTRE, SPREAD = -5.6, 1.3  # mean and deviation of log10(energy + FLOOR) over puppets' voices


def listen(params: Params, samples_BS, config: LogMelConfig, *, lora: Params | None = None):
    """Recordings of equal length, in [-1, 1] -> (B, token_count, width) float32. Vector i is centred on its 20 ms."""
    assert not params and not lora, "there is nothing in log-mel features that could be learnt"
    count = token_count(samples_BS.shape[1], config)
    margin = (WINDOW - HOP) // 2
    padded = jnp.pad(samples_BS[:, : count * HOP].astype(jnp.float32), ((0, 0), (margin, margin)))
    halves = padded.reshape(padded.shape[0], count + WINDOW // HOP - 1, HOP)
    frames = jnp.concatenate([halves[:, i : i + count] for i in range(WINDOW // HOP)], axis=-1)
    power = jnp.square(jnp.abs(jnp.fft.rfft(frames * np.hanning(WINDOW).astype(np.float32), axis=-1)))
    energies = power @ _filters(config.bands) / np.float32(np.square(np.hanning(WINDOW)).sum())
    x_BAC = (jnp.log10(energies + FLOOR) - CENTRE) / SPREAD
    around = jnp.pad(x_BAC, ((0, 0), (config.context, config.context), (0, 0)), mode="edge")
    parts = [around[:, i : i + count] for i in range(2 * config.context + 1)]
    places = jnp.broadcast_to(_places(count, config.periods), (x_BAC.shape[0], count, 2 * len(config.periods)))
    return jnp.concatenate([*parts, places], axis=-1)


def normalise(samples: np.ndarray) -> np.ndarray:
    """As they are: how loud a voice is tells how far the mouth is open, and silence must stay silent."""
    return np.asarray(samples, np.float32)


def token_count(samples: int, config: LogMelConfig) -> int:
    return samples // HOP


def init(config: LogMelConfig, key) -> Params:
    return {}


@functools.cache
def _filters(bands: int) -> np.ndarray:
    """Slaney's triangles, (WINDOW / 2 + 1, bands)."""
    return librosa.filters.mel(sr=SAMPLE_RATE, n_fft=WINDOW, n_mels=bands, fmin=50, fmax=8000).T.astype(np.float32)


def _places(count: int, periods: tuple[int, ...]) -> np.ndarray:
    """Sine and cosine of the vector's number for every period, (count, 2 * periods)."""
    turns = 2 * math.pi * np.arange(count)[:, None] / np.array(periods)
    return np.concatenate([np.sin(turns), np.cos(turns)], axis=1).astype(np.float32)


AXES = {}
TORCH = []
UNUSED = ()
