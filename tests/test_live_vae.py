"""The video autoencoder beside diffusers' own, with the same random weights."""

from functools import partial

import jax
import numpy as np
import pytest

from kavatar_jax.checkpoint.bridge import reference_shapes, to_kavatar, unflatten
from kavatar_jax.config import VAEConfig
from kavatar_jax.models import vae
from tools.reference.vae import diffusers_key

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch

SMALL = VAEConfig(width=12, latent_channels=16, latent_mean=vae.LATENT_MEAN, latent_std=vae.LATENT_STD)


@pytest.fixture(scope="module")
def networks():
    """Theirs with every parameter drawn anew, gains and biases included, and ours with the same."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    theirs = AutoencoderKLWan(base_dim=SMALL.width, z_dim=SMALL.latent_channels).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            gain, bias = name.endswith("gamma"), parameter.ndim == 1
            parameter.copy_(1 + 0.1 * drawn if gain else drawn * (0.1 if bias else parameter[0].numel() ** -0.5))
    abstract = jax.eval_shape(partial(vae.init, SMALL), jax.random.key(0))
    keys = reference_shapes(vae.TORCH, abstract)
    state = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    assert len({diffusers_key(key) for key in keys}) == len(keys) == len(state)
    weights = {key: state[diffusers_key(key)] for key in keys}
    assert vae.config_of({key: tensor.shape for key, tensor in weights.items()}, theirs.config) == SMALL
    return theirs, unflatten(to_kavatar(weights, vae.TORCH, abstract))


def assert_close(ours, theirs):
    theirs = np.moveaxis(theirs.numpy(), 1, -1)
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max() < 1e-4


@torch.no_grad()
def test_encode(networks):
    theirs, params = networks
    video = np.random.default_rng(0).uniform(-1, 1, (2, 9, 24, 40, 3)).astype(np.float32)
    posterior = theirs.encode(torch.from_numpy(np.moveaxis(video, -1, 1).copy())).latent_dist
    mean, logvar = jax.jit(partial(vae.encode, config=SMALL))(params, video)
    assert_close(mean * np.float32(SMALL.latent_std) + np.float32(SMALL.latent_mean), posterior.mean)
    assert np.abs(logvar).max() < 20  # theirs is clamped there
    assert_close(logvar, posterior.logvar)


@torch.no_grad()
def test_decode(networks):
    theirs, params = networks
    latents = np.random.default_rng(1).standard_normal((2, 3, 3, 5, 16)).astype(np.float32)
    raw = latents * np.float32(SMALL.latent_std) + np.float32(SMALL.latent_mean)
    expected = theirs.decode(torch.from_numpy(np.moveaxis(raw, -1, 1).copy())).sample
    video = jax.jit(partial(vae.decode, config=SMALL))(params, latents)
    assert np.mean(np.abs(video) < 1) > 0.9  # theirs is clamped there
    assert_close(np.clip(video, -1, 1), expected)
