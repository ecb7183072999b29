"""The linear start of an autoencoder: what it keeps of clips made of few patterns, and the command that makes it."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from kavatar_jax.checkpoint.weights import read_config
from kavatar_jax.config import VAEConfig
from kavatar_jax.models import vae
from kavatar_jax.training.config import ReconstructionConfig
from kavatar_jax.training.data import Clips
from kavatar_jax.training.principal import principal_autoencoder
from kavatar_jax.training.reconstruction import draw, losses, reconstruct
from tools import principal

CONFIG = VAEConfig(
    width=4, latent_channels=5, latent_mean=(0.0,) * 5, latent_std=(1.0,) * 5, multipliers=(1, 1), blocks=1,
    temporal=(True,), patch=2, bypass=True,
)  # fmt: skip


def clip(rng, patterns, *, lips):
    """5 frames of 8 x 8 whose cells, of 2 x 4 x 4 pixels, are grey and a random mixture of patterns."""
    first, later = (127.5 + np.tensordot(rng.uniform(-20, 20, (2, 2, 2, len(patterns))), patterns, 1) for _ in range(2))
    video = np.empty((5, 8, 8, 3))
    for row, column in np.ndindex(2, 2):
        place = np.s_[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        video[place][0] = first[0, row, column, 1]  # a first frame stands for both of its cell
        video[1:3][place], video[3:][place] = first[1, row, column], later[1, row, column]
    lip = np.zeros((5, 8, 8), bool)
    lip[:, 4:, 4:] = lips
    return {"video": np.round(video).astype(np.uint8), "lip": lip}


@pytest.fixture(scope="module")
def patterns():
    rng = np.random.default_rng(0)
    found = np.repeat(rng.uniform(-1, 1, (4, 1, 4, 4, 3)), 2, axis=1)
    found[3] = np.stack([found[3, 0], -found[3, 0]])  # one that moves
    return found


def test_what_lies_in_few_dimensions_comes_back(patterns):
    rng = np.random.default_rng(1)
    clips = [clip(rng, patterns, lips=False) for _ in range(60)]
    params = principal_autoencoder(clips, CONFIG, lip_weight=1.0, seed=0)
    made = np.asarray(reconstruct(params, clips[0]["video"][None], CONFIG))[0]
    assert np.abs(made.astype(int) - clips[0]["video"]).max() <= 3  # of rounding
    poorer = replace(CONFIG, latent_channels=2, latent_mean=(0.0,) * 2, latent_std=(1.0,) * 2)
    params = principal_autoencoder(clips, poorer, lip_weight=1.0, seed=0)
    made = np.asarray(reconstruct(params, clips[0]["video"][None], poorer))[0]
    assert np.abs(made.astype(int) - clips[0]["video"]).max() > 10


def test_cells_with_lips_count_more(patterns):
    """With room for one pattern only, it is that of the lips, if they weigh enough."""
    rng, config = np.random.default_rng(2), replace(CONFIG, latent_channels=1, latent_mean=(0.0,), latent_std=(1.0,))
    clips = []
    for _ in range(60):
        one, lips = clip(rng, patterns[:1], lips=True), clip(rng, patterns[1:2], lips=True)
        one["video"][:, 4:, 4:] = lips["video"][:, 4:, 4:]
        clips.append(one)
    errors = {}
    for weight in (0.01, 100.0):
        params = principal_autoencoder(clips, config, lip_weight=weight, seed=0)
        made = np.asarray(reconstruct(params, clips[0]["video"][None], config))[0]
        errors[weight] = np.abs(made.astype(int) - clips[0]["video"])[:, 4:, 4:].mean()
    assert errors[100.0] < 1.5 < 0.3 * errors[0.01]


def test_noise_on_what_is_decoded(patterns):
    """A linear autoencoder that loses nothing errs by what the noise alone decodes to."""
    rng = np.random.default_rng(3)
    made = [clip(rng, patterns, lips=True) for _ in range(60)]
    params = principal_autoencoder(made, CONFIG, lip_weight=1.0, seed=0)
    video, lip = (np.stack([one[name] for one in made[:2]]) for name in ("video", "lip"))
    clips = Clips(video=video, face=0 * lip, lip=lip)
    draws = draw(jax.random.key(0), clips, CONFIG)._replace(level=np.array([0.5, 1.0]))

    @jax.jit
    def error(noise):
        config = ReconstructionConfig(spread=0.0, noise=noise)
        return losses(params, clips, draws, CONFIG, config)["error"]

    decoded = jax.jit(lambda latents: vae.decode(params, latents, CONFIG))

    alone = decoded(2.0 * draws.level[:, None, None, None, None] * draws.noise) - decoded(0 * draws.noise)
    assert error(0.0).max() < 0.01
    np.testing.assert_allclose(error(2.0), np.abs(alone).mean(axis=(1, 2, 3, 4)), rtol=0.02)
    assert error(2.0)[1] > 0.1


def test_the_command(tmp_path, capsys):
    small = ["--set", "model.vae.width=8", "--clips", "3"]
    assert principal.main(["demo_vae", str(tmp_path), *small]) == 0
    assert read_config(tmp_path / "vae", VAEConfig).bypass
    capsys.readouterr()
    assert principal.main(["demo_vae", str(tmp_path), "--set", "model.vae.bypass=false", *small]) == 2
    assert "bypass" in capsys.readouterr().err
    assert principal.main(["demo_dit", str(tmp_path)]) == 2
    assert "demo_vae" in capsys.readouterr().err
