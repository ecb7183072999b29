"""A training run's folder as weights: what a checkpoint holds over what the run began from, LoRA apart.

The checkpoint has what learns; the rest is read from the weights directory that the run's config.json names. Nothing is
compiled and no mesh is needed.
"""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kavatar_jax.checkpoint.bridge import flatten
from kavatar_jax.checkpoint.files import Parts, Tensors, read_json
from kavatar_jax.checkpoint.lora import Change, Changes
from kavatar_jax.checkpoint.store import Stored
from kavatar_jax.checkpoint.weights import revive
from kavatar_jax.models.components import abstract
from kavatar_jax.training.config import TrainConfig
from kavatar_jax.training.state import adopt, is_fresh, learning

LINEAR = "oi->io"  # of every tensor that a run puts a branch beside


class Run(NamedTuple):
    """config: the networks as they are stored; kind: which weights of the checkpoint, "ema" or "trained"."""

    config: TrainConfig
    stored: Stored
    kind: str

    @property
    def learnt(self) -> list[str]:
        """The networks of which something learns."""
        return sorted(learning(self.config))

    @property
    def start(self) -> Path:
        """The weights directory that the run began from."""
        return Path(self.config.weights)

    def network(self, name: str) -> "Learnt":
        return Learnt(self, name)

    def branches(self, name: str) -> Changes:
        """The LoRA beside a network's linears."""
        lora, start = self.config.trained.lora, f"{self.kind}/lora/{name}/"
        read, found = self.stored.read([key for key in self.stored if key.startswith(start)]), {}
        for key in (key for key in read if key.endswith("/down")):
            assert lora is not None, key
            module = key.removesuffix("/down")
            down, up = read[key], read[f"{module}/up"]
            layers = range(len(down)) if down.ndim == 3 else [None]
            pairs = zip(layers, down if down.ndim == 3 else [down], up if down.ndim == 3 else [up], strict=True)
            changes = {layer: [Change(LINEAR, lora.scale, down=down.T, up=up.T)] for layer, down, up in pairs}
            found[f"{module.removeprefix(start)}/kernel"] = changes
        return found


class Learnt(Parts):
    """One network's parameters: float32 where they learn, else as the run began from them, `dtypes` those it stores.

    ValueError if the rest was drawn from chance, which no file holds.
    """

    def __init__(self, run: Run, name: str):
        model = getattr(run.config.model, name)
        self.shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract(name, model)).items()}
        self.dtypes = dict.fromkeys(self.shapes, np.dtype(jnp.dtype(model.param_dtype)))
        keys = {path: f"{run.kind}/params/{name}/{path}" for path in self.shapes}
        self._stored, self._keys = run.stored, {path: key for path, key in keys.items() if key in run.stored}
        rest = self.shapes.keys() - self._keys.keys()
        if chance := sorted(path for path in rest if is_fresh(f"{name}/{path}", run.config)):
            raise ValueError(
                f"{name}: {', '.join(chance[:5])} and {len(chance)} in all began from chance and did not learn, so that no "
                f"checkpoint holds them; let the run finish, and take its weights/"
            )
        self._start = Tensors(run.start / name / "model.safetensors") if rest else Tensors()
        self._last: tuple[str, np.ndarray] = "", np.empty(0)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one parameter, as a copy; of those that learn the whole is read once."""
        if name not in self._keys:
            return self._start.part(name, index).astype(self.dtypes[name])
        if self._last[0] != name:
            self._last = name, self._stored[self._keys[name]]
        return np.array(self._last[1][index])


def open_run(folder: Path, *, step: int | None = None, kind: str = "") -> Run:
    """The folder of `kavatar train`, at a step, the newest if None.

    kind: "ema", the averages, "raw", the weights that they are averages of, or "", the averages where there are any
    ValueError if the step or the kind is not there, or if the run is one whose weights need its data: the autoencoder's
    latents are measured when it ends.
    """
    if kind not in ("", "ema", "raw"):
        raise ValueError(f"--weights-of {kind} is not one of ema, raw")
    described = read_json(folder / "config.json")
    config = adopt(revive(described, TrainConfig, f"{folder / 'config.json'}"))
    if config.task == "vae":
        raise ValueError(
            f"{folder} trains the autoencoder, whose latents are measured at the end; take its weights/ then"
        )
    stored = Stored(folder / "checkpoints", step)
    averaged = any(key.startswith("ema/") for key in stored)
    if kind == "ema" and not averaged:
        raise ValueError(f"{folder} keeps no averages; take --weights-of raw")
    return Run(config, stored, "ema" if averaged and kind != "raw" else "trained")
