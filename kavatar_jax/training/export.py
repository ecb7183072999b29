"""What was learnt as a weights directory: one folder per network, LoRA folded in, ready for `kavatar generate`."""

import shutil
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


def export(model: Config, components: frozenset[str], whole: Params, folder: Path, *, start: str) -> None:
    """Write those components, in the dtype that the model stores. whole: {"params": ..., "lora": ...}, by component.

    start: the weights directory that training began from, "" for none; a text encoder takes its tokenizer along, which is
    plain bytes where there is none. Every process has to call this; the first one writes.
    """
    for name in sorted(components):
        config = getattr(model, name)
        params = whole["params"][name]
        if whole["lora"].get(name):
            params = jax.jit(fold_lora)(params, whole["lora"][name])
        arrays = {path: _on_host(leaf, config.param_dtype) for path, leaf in flatten(params).items()}
        if jax.process_index() == 0:
            save_component(unflatten(arrays), config, folder / name)
    if "text" in components and jax.process_index() == 0:
        take_tokenizer(folder / "tokenizer", start)


def _on_host(leaf, dtype: str) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(leaf.astype(jnp.dtype(dtype)), tiled=True))


def take_tokenizer(folder: Path, start: str) -> None:
    """The tokenizer of the weights directory `start`, plain bytes where there is none."""
    if start and (Path(start) / "tokenizer").is_dir():
        shutil.copytree(Path(start) / "tokenizer", folder, dirs_exist_ok=True)
        return
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"kind": "bytes"}\n')
