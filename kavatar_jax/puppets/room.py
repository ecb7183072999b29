"""Where a voice is recorded: clean speech and a room go in, the recording comes out, sample for sample in time.

Echo, noise, hum, a wandering gain and a microphone that saturates: so that loudness alone does not tell how far the
mouth is open.
"""

from dataclasses import dataclass

import numpy as np
from scipy import signal

from kavatar_jax.types import SAMPLE_RATE

_USUAL = 0.07  # RMS of clean speech, against which noise and hum are set, so that a silent room is as noisy


@dataclass(frozen=True, kw_only=True)
class Room:
    """gain: of the microphone; snr: dB of speech over noise; dull: colour of the noise, 0 white .. 1 brown; hum: its
    amplitude over that of usual speech, at mains Hz; echo: of the sound, dying by 60 dB in echo_seconds; drift: dB by
    which the gain wanders; overload: how far loud peaks are flattened, 0 none."""

    gain: float = 1.0
    snr: float = 60.0
    dull: float = 0.5
    hum: float = 0.0
    mains: float = 50.0
    echo: float = 0.0
    echo_seconds: float = 0.3
    drift: float = 0.0
    overload: float = 0.0


def sample_room(seed: int) -> Room:
    """Anything from a studio to a noisy kitchen."""
    rng = np.random.default_rng([seed, 0x20])
    return Room(
        gain=10 ** (rng.uniform(-10, 3) / 20),
        snr=rng.uniform(12, 45),
        dull=rng.uniform(0, 1),
        hum=rng.uniform(0, 0.08) * (rng.random() < 0.4),
        mains=float(rng.choice([50.0, 60.0])),
        echo=rng.uniform(0, 0.35) * (rng.random() < 0.7),
        echo_seconds=rng.uniform(0.12, 0.5),
        drift=rng.uniform(0, 4),
        overload=rng.uniform(0, 1) * (rng.random() < 0.3),
    )


def record(samples: np.ndarray, room: Room, *, seed: int) -> np.ndarray:
    """(n,) float32 in [-1, 1]: what a microphone in the room hears of (n,) clean samples; nothing is delayed."""
    rng = np.random.default_rng([seed, 0x21])
    count = len(samples)
    heard = samples.astype(np.float64)
    if room.echo > 0:
        heard = heard + room.echo * _echo(heard, room.echo_seconds, rng)
    heard = heard + _USUAL * 10 ** (-room.snr / 20) * _noise(count, room.dull, rng)
    if room.hum > 0:
        turns = np.arange(count) * (room.mains / SAMPLE_RATE)
        heard += room.hum * _USUAL * sum(np.sin(2 * np.pi * k * turns + k) / k for k in (1, 2, 3, 5))
    knots = np.arange(count // SAMPLE_RATE + 3)
    wander = np.interp(np.arange(count) / SAMPLE_RATE, knots, rng.uniform(-1, 1, len(knots)) * room.drift)
    heard *= room.gain * 10 ** (wander / 20)
    if room.overload > 0:
        ceiling = 0.9 - 0.5 * room.overload
        heard = ceiling * np.tanh(heard / ceiling)
    return np.clip(heard, -1, 1).astype(np.float32)


def _echo(samples: np.ndarray, seconds: float, rng) -> np.ndarray:
    """Late sound only, after 8 ms, from an exponentially dying random response of unit energy."""
    start, length = int(0.008 * SAMPLE_RATE), int(seconds * SAMPLE_RATE)
    response = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    response[:start] = 0
    response /= np.sqrt(np.sum(response**2))
    return signal.fftconvolve(samples, response)[: len(samples)]


def _noise(count: int, dull: float, rng) -> np.ndarray:
    """Noise of unit RMS whose spectrum falls by 6 * dull dB per octave."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    hertz = np.maximum(np.fft.rfftfreq(count, 1 / SAMPLE_RATE), 40)
    noise = np.fft.irfft(spectrum * hertz**-dull, count)
    return noise / np.sqrt(np.mean(noise**2))
