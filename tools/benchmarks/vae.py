"""Decoding video: our VAE beside diffusers' AutoencoderKLWan, at the published width and with the same weights."""

import statistics
import time
from functools import partial

import jax
import numpy as np

from kavatar_jax.checkpoint.bridge import reference_shapes, to_kavatar, unflatten
from kavatar_jax.config import VAEConfig
from kavatar_jax.models import vae
from tools.reference.synthetic_weights import synthesize
from tools.reference.vae import diffusers_key

RELEASED = VAEConfig(width=96, latent_channels=16, latent_mean=vae.LATENT_MEAN, latent_std=vae.LATENT_STD)


def vae_decode(shape: tuple[int, int, int] = (3, 16, 28), *, rounds: int = 5) -> dict:
    """Seconds to decode latents (T, H, W) in float32 on every core, in turns: ours, theirs, and so on; medians.

    difference: largest deviation of the frames, which lie in [-1, 1]. Needs torch and diffusers.
    """
    import torch
    from diffusers import AutoencoderKLWan

    abstract = jax.eval_shape(partial(vae.init, RELEASED), jax.random.key(0))
    weights = synthesize(list(reference_shapes(vae.TORCH, abstract).items()), "bench/vae")
    params = jax.device_put(unflatten(to_kavatar(weights, vae.TORCH, abstract)))
    theirs = AutoencoderKLWan(base_dim=RELEASED.width, z_dim=RELEASED.latent_channels).eval()
    theirs.load_state_dict({diffusers_key(key): torch.from_numpy(tensor) for key, tensor in weights.items()})
    del weights

    latents = np.random.default_rng(0).standard_normal((1, *shape, RELEASED.latent_channels)).astype(np.float32)
    raw = latents * np.float32(RELEASED.latent_std) + np.float32(RELEASED.latent_mean)
    raw = torch.from_numpy(np.ascontiguousarray(np.moveaxis(raw, -1, 1)))
    decode = jax.jit(partial(vae.decode, config=RELEASED))

    def decode_ours():
        return np.clip(np.asarray(decode(params, latents)), -1, 1)

    @torch.no_grad()
    def decode_theirs():
        return np.moveaxis(theirs.decode(raw).sample.numpy(), 1, -1)

    difference = float(np.abs(decode_ours() - decode_theirs()).max())
    seconds = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for name, run in (("ours", decode_ours), ("theirs", decode_theirs)):
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "latents": shape,
        "threads": torch.get_num_threads(),
        "seconds": medians["ours"],
        "diffusers_seconds": medians["theirs"],
        "ratio": statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)),
        "difference": difference,
    }
