"""Whisper's encoder: where a tone shows, that silence stays silent, and the interface shared with wav2vec 2.0."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from configs import demo
from kavatar_jax.config import SPEECH_TOKEN
from kavatar_jax.models import whisper
from kavatar_jax.models.components import COMPONENTS
from kavatar_jax.types import SAMPLE_RATE

CONFIG = replace(demo.config().speech, memory=0)
init = jax.jit(whisper.init, static_argnums=0)  # compiled once, where it would be operation by operation


def tone(hertz, seconds=1.0):
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE).astype(np.float32)


def log_mel(samples):
    return np.asarray(whisper.log_mel(jnp.asarray(samples)[None], 40))[0]


@pytest.mark.parametrize("hertz", [200, 1000, 4000])
def test_a_tone_shows_in_its_own_band(hertz):
    centres = librosa.mel_frequencies(42, fmin=0, fmax=8000)[1:-1]
    assert np.abs(centres - hertz).argmin() in np.argsort(log_mel(0.3 * tone(hertz))[50])[-2:]


def test_energies_are_librosas():
    samples = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE).astype(np.float32)
    power = np.abs(librosa.stft(np.pad(samples, 200, mode="reflect"), n_fft=400, hop_length=160, center=False)) ** 2
    energies = librosa.feature.melspectrogram(S=power, sr=SAMPLE_RATE, n_mels=40, fmin=0, fmax=8000).T[:100]
    logarithms = np.log10(energies)
    expected = (np.maximum(logarithms, logarithms.max() - 8) + 4) / 4
    np.testing.assert_allclose(log_mel(samples), expected, atol=1e-4)


def test_how_loud_it_is_is_told():
    loud, quiet = log_mel(0.3 * tone(300)), log_mel(whisper.normalise(0.03 * tone(300)))
    np.testing.assert_allclose(loud.max() - quiet.max(), 2 / 4, atol=1e-3)  # two powers of ten
    assert np.unique(log_mel(np.zeros(6400, np.float32))).tolist() == [-1.5]


def test_what_is_past_a_whole_token_is_not_heard_and_silence_is_filled_in():
    params = init(CONFIG, jax.random.key(0))
    samples = 0.1 * np.random.default_rng(1).standard_normal((1, 6500)).astype(np.float32)
    heard = whisper.listen(params, samples, CONFIG)
    assert heard.shape == (1, whisper.token_count(6500, CONFIG), CONFIG.width) == (1, 20, 96)
    np.testing.assert_array_equal(heard, whisper.listen(params, samples[:, :6400], CONFIG))
    filled = replace(CONFIG, filled=True)
    rest = CONFIG.positions * SPEECH_TOKEN - 6400
    longer = whisper.listen(params, np.pad(samples[:, :6400], ((0, 0), (0, rest))), CONFIG)
    np.testing.assert_allclose(whisper.listen(params, samples[:, :6400], filled), longer[:, :20], atol=1e-5)


def test_an_encoder_with_a_memory_hears_more_than_it_tells():
    params = init(CONFIG, jax.random.key(0))
    samples = 0.1 * np.random.default_rng(2).standard_normal((2, 6400)).astype(np.float32)
    told = whisper.listen(params, samples, replace(CONFIG, memory=12))
    np.testing.assert_array_equal(told, whisper.listen(params, samples, CONFIG)[:, 12:])
    alone = whisper.listen(params, samples[:, 12 * SPEECH_TOKEN :], CONFIG)
    assert told.shape == alone.shape and np.abs(told - alone).max() > 0.01


def test_every_kind_has_the_interface():
    kinds = COMPONENTS["speech"].kinds
    for model in kinds.values():
        assert all(
            callable(getattr(model, name)) for name in ("listen", "normalise", "token_count", "init", "config_of")
        )
    assert type(demo.config().speech) in kinds and type(demo.tiny().speech) in kinds
