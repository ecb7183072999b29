"""umT5 text features of recorded token ids."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.models import umt5
from tools.reference import load
from tools.reference.synthetic_weights import Fixture

FIXTURES = ("umt5_",)


def run(fixture: Fixture) -> Iterator[tuple[str, np.ndarray]]:
    config = umt5.config_of(dict(fixture.shapes()), fixture.meta["config"])
    abstract = jax.eval_shape(partial(umt5.init, config), jax.random.key(0))
    params = load(fixture, umt5.TORCH, abstract, unused=umt5.UNUSED)
    encode = jax.jit(lambda params, ids, mask: umt5.UMT5(config).apply({"params": params}, ids, mask))
    for case, described in fixture.meta["cases"].items():
        mask_BL = np.arange(described["padded_length"]) < np.asarray(described["lengths"])[:, None]
        ids_BL = np.where(mask_BL, fixture.inputs(case)["ids"], 0)
        features_BLD = np.asarray(encode(params, jnp.asarray(ids_BL, jnp.int32), jnp.asarray(mask_BL)))
        for b, length in enumerate(described["lengths"]):
            yield f"{case}/features{b}", features_BLD[b, :length]
