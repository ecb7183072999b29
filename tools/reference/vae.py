"""The video autoencoder: latents of recorded videos and frames of recorded latents."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from kavatar_jax.models import vae
from tools.reference import load
from tools.reference.synthetic_weights import Fixture

FIXTURES = ("vae_",)


def run(fixture: Fixture) -> Iterator[tuple[str, np.ndarray]]:
    config = vae.config_of(dict(fixture.shapes()), fixture.meta["config"])
    abstract = jax.eval_shape(partial(vae.init, config), jax.random.key(0))
    params = load(fixture, vae.TORCH, abstract, unused=vae.UNUSED)
    encode = jax.jit(partial(vae.encode, config=config))
    decode = jax.jit(partial(vae.decode, config=config))
    for case in fixture.meta["cases"]:
        inputs = {name: np.moveaxis(x, 1, -1) for name, x in fixture.inputs(case).items()}
        if "video" in inputs:
            mean, logvar = encode(params, inputs["video"])
            yield f"{case}/mu", np.moveaxis(np.asarray(mean), -1, 1)
            yield f"{case}/logvar", np.moveaxis(np.asarray(logvar), -1, 1)
        else:
            yield f"{case}/raw", np.moveaxis(np.asarray(decode(params, inputs["latent"])), -1, 1)


def diffusers_key(key: str) -> str:
    """A key of the published checkpoint as diffusers' AutoencoderKLWan (0.42) spells it."""
    if key.startswith(("conv1.", "conv2.")):
        return key.replace("conv1", "quant_conv").replace("conv2", "post_quant_conv")
    side, part, *rest = key.split(".")
    if part == "conv1":
        place = "conv_in"
    elif part == "head":
        place = {"0": "norm_out", "2": "conv_out"}[rest.pop(0)]
    elif part == "middle":
        place = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}[rest.pop(0)]
    elif part == "downsamples":
        place = f"down_blocks.{rest.pop(0)}"
    else:
        level, block = divmod(int(rest.pop(0)), 4)
        place = f"up_blocks.{level}." + ("upsamplers.0" if block == 3 else f"resnets.{block}")
    leaves = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
    leaf = ".".join(rest).replace("shortcut", "conv_shortcut")
    for theirs, ours in leaves.items():
        leaf = leaf.replace(f"{theirs}.", f"{ours}.")
    return f"{side}.{place}.{leaf}"
