"""CLIP image tokens of recorded pixels and of recorded images of other sizes."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from kavatar_jax.models import clip
from tools.reference import load
from tools.reference.synthetic_weights import Fixture

FIXTURES = ("clip_",)


def run(fixture: Fixture) -> Iterator[tuple[str, np.ndarray]]:
    config = clip.config_of(dict(fixture.shapes()), fixture.meta["config"])
    abstract = jax.eval_shape(partial(clip.init, config), jax.random.key(0))
    params = load(fixture, clip.TORCH, abstract, unused=clip.UNUSED)
    look = jax.jit(lambda params, pixels: clip.CLIP(config).apply({"params": params}, pixels))
    for case in fixture.meta["cases"]:
        pixels = fixture.inputs(case)["image"].transpose(0, 2, 3, 1)
        if f"{case}/pixels" in fixture.meta["outputs"]:
            pixels = clip.preprocess(pixels, config)
            yield f"{case}/pixels", pixels.transpose(0, 3, 1, 2)
        yield f"{case}/features", np.asarray(look(params, pixels).tokens)
