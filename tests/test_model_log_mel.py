"""Log-mel features: where a tone shows, that silence and time are told, and the interface shared with wav2vec 2.0."""

import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from configs import demo
from kavatar_jax.config import LogMelConfig
from kavatar_jax.models import log_mel
from kavatar_jax.models.components import COMPONENTS
from kavatar_jax.types import SAMPLE_RATE

CONFIG = LogMelConfig(bands=40, context=1, periods=(8, 32))


def tone(hertz, seconds=1.0):
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE).astype(np.float32)


def listen(samples, config=CONFIG):
    return np.asarray(log_mel.listen({}, jnp.asarray(samples)[None], config))[0]


@pytest.mark.parametrize("hertz", [200, 1000, 4000])
def test_a_tone_shows_in_its_own_band(hertz):
    features = listen(0.3 * tone(hertz))
    own = features[10, CONFIG.bands : 2 * CONFIG.bands]  # the middle of three neighbours
    centres = librosa.mel_frequencies(CONFIG.bands + 2, fmin=50, fmax=8000)[1:-1]
    assert np.abs(centres - hertz).argmin() in np.argsort(own)[-2:]


def test_energies_are_librosas():
    samples = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE).astype(np.float32)
    window = np.hanning(log_mel.WINDOW)
    power = np.abs(librosa.stft(
        np.pad(samples, 160), n_fft=log_mel.WINDOW, hop_length=log_mel.HOP, window=window, center=False)) ** 2  # fmt: skip
    expected = librosa.feature.melspectrogram(S=power, sr=SAMPLE_RATE, n_mels=CONFIG.bands, fmin=50, fmax=8000).T
    expected = (np.log10(expected / np.square(window).sum() + log_mel.FLOOR) - log_mel.CENTRE) / log_mel.SPREAD
    np.testing.assert_allclose(listen(samples)[:, CONFIG.bands : 2 * CONFIG.bands], expected, atol=1e-4)


def test_vectors_hold_their_neighbours_and_their_place():
    features = listen(np.random.default_rng(0).normal(0, 0.1, 6400).astype(np.float32))
    bands = CONFIG.bands
    assert features.shape == (log_mel.token_count(6400, CONFIG), CONFIG.width) == (20, 3 * bands + 4)
    np.testing.assert_array_equal(features[1:, :bands], features[:-1, bands : 2 * bands])
    np.testing.assert_array_equal(features[:-1, 2 * bands : 3 * bands], features[1:, bands : 2 * bands])
    np.testing.assert_allclose(features[8:, -4], features[:-8, -4], atol=1e-6)  # the sine of period 8
    assert len(np.unique(features[:16, -4:].round(4), axis=0)) == 16


def test_silence_stays_silent():
    faint = 1e-5 * np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32)
    quiet, loud = listen(log_mel.normalise(faint)), listen(log_mel.normalise(0.3 * tone(300)))
    lowest = (np.log10(log_mel.FLOOR) - log_mel.CENTRE) / log_mel.SPREAD
    np.testing.assert_allclose(quiet[:, : 3 * CONFIG.bands], lowest, atol=1e-3)
    assert loud[5, : 3 * CONFIG.bands].max() > lowest + 2


def test_every_kind_has_the_interface():
    kinds = COMPONENTS["speech"].kinds
    for model in kinds.values():
        assert all(callable(getattr(model, name)) for name in ("listen", "normalise", "token_count", "init"))
    assert type(demo.config().speech) in kinds and type(demo.tiny().speech) in kinds
