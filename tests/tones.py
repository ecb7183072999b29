"""Requests of any length that need no files: a tone with pauses instead of speech, noise instead of a portrait."""

import numpy as np

from kavatar_jax.types import SAMPLE_RATE, Request, Speech


def make_request(config, seconds, *, seed=0, beat=1.5):
    """beat: how often a second the tone is on."""
    rng = np.random.default_rng(5)
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    samples = 0.2 * np.sin(2 * np.pi * 150 * time) * (np.sin(2 * np.pi * beat * time) > -0.3)
    portrait = rng.integers(0, 256, (config.height, config.width, 3), np.uint8)
    return Request(portrait=portrait, speech=Speech(samples=samples.astype(np.float32)), instruction="smile", seed=seed)
