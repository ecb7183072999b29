"""Decoding video: our VAE beside diffusers' AutoencoderKLWan, at the published width and with the same weights."""

from functools import partial

import jax
import numpy as np

from kavatar_jax.checkpoint.bridge import reference_shapes, to_kavatar, unflatten
from kavatar_jax.config import VAEConfig
from kavatar_jax.models import vae
from tools.benchmarks.paired import paired
from tools.reference.synthetic_weights import synthesize
from tools.reference.vae import diffusers_key

RELEASED = VAEConfig(width=96, latent_channels=16, latent_mean=vae.LATENT_MEAN, latent_std=vae.LATENT_STD)


def vae_decode(shape: tuple[int, int, int] = (3, 16, 28), *, rounds: int = 5) -> dict:
    """Seconds to decode latents (T, H, W) in float32, ours and diffusers', each on as many threads as it is given.

    difference: the largest deviation of the frames, which lie in [-1, 1]. Needs torch and diffusers.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    abstract = jax.eval_shape(partial(vae.init, RELEASED), jax.random.key(0))
    weights = synthesize(list(reference_shapes(vae.TORCH, abstract).items()), "bench/vae")
    params = jax.device_put(unflatten(to_kavatar(weights, vae.TORCH, abstract)))
    network = AutoencoderKLWan(base_dim=RELEASED.width, z_dim=RELEASED.latent_channels).eval()
    network.load_state_dict({diffusers_key(key): torch.from_numpy(tensor) for key, tensor in weights.items()})
    del weights

    latents = np.random.default_rng(0).standard_normal((1, *shape, RELEASED.latent_channels)).astype(np.float32)
    raw = np.moveaxis(latents * np.float32(RELEASED.latent_std) + np.float32(RELEASED.latent_mean), -1, 1)
    raw = torch.from_numpy(np.ascontiguousarray(raw))
    decode = jax.jit(partial(vae.decode, config=RELEASED))

    def ours():
        return np.clip(np.asarray(decode(params, latents)), -1, 1)

    @torch.no_grad()
    def theirs():
        return np.moveaxis(network.decode(raw).sample.numpy(), 1, -1)

    difference = float(np.abs(ours() - theirs()).max())
    timed = paired(ours, theirs, rounds=rounds)
    return {
        "latents": shape,
        "torch_threads": torch.get_num_threads(),
        "seconds": timed.ours,
        "diffusers_seconds": timed.theirs,
        "ratio": timed.ratio,
        "spread": timed.spread,
        "difference": difference,
    }
