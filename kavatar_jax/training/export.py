"""What was learnt as a weights directory: one folder per network, LoRA folded in, ready for `kavatar generate`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from kavatar_jax.checkpoint.bridge import flatten, unflatten
from kavatar_jax.checkpoint.weights import save_component
from kavatar_jax.config import Config
from kavatar_jax.training.state import fold_lora
from kavatar_jax.types import Params


def export(model: Config, components: frozenset[str], whole: Params, folder: Path) -> None:
    """Write those components, in the dtype that the model stores. whole: {"params": ..., "lora": ...}, by component.

    Every process has to call it; the first one writes.
    """
    for name in sorted(components):
        config = getattr(model, name)
        params = whole["params"][name]
        if whole["lora"].get(name):
            params = jax.jit(fold_lora)(params, whole["lora"][name])
        arrays = {path: _on_host(leaf, config.param_dtype) for path, leaf in flatten(params).items()}
        if jax.process_index() == 0:
            save_component(unflatten(arrays), config, folder / name)


def _on_host(leaf, dtype: str) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(leaf.astype(jnp.dtype(dtype)), tiled=True))
