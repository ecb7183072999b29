"""Checkpoints of a training run: a tree of arrays and a small record beside it, by step.

Written in the background under another name and renamed when whole; the newest few are kept. A tree is read back onto
whatever mesh is asked for. Source: orbax.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from kavatar_jax.checkpoint.bridge import flatten, unflatten

NAME = "state"
SHARED_BYTES = 1 << 20


class Store:
    """The checkpoints in a folder. Leaving the `with` block waits for what is still being written."""

    def __init__(self, folder: Path, *, keep: int):
        context = ocp.Context()
        # replicas share the work of writing an array only where it is large: each shape costs them a compilation
        context.array.saving.min_slice_bytes_for_replica_parallel = SHARED_BYTES
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            context=context,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The newest step there is, None if there is none."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    @property
    def steps(self) -> list[int]:
        return [found.step for found in self._checkpointer.checkpoints]

    def save(self, step: int, tree: Any, record: dict) -> None:
        """Returns once the arrays are copied, so that they may be given up; a step that is there is left alone.

        record: what JSON can hold.
        """
        if step not in self.steps:
            self._checkpointer.save_async(step, tree, checkpointable_name=NAME, force=True, custom_metadata=record)

    def restore(self, abstract: Any, *, step: int | None = None) -> tuple[Any, dict]:
        """The tree of a step, the latest if None, as `abstract` wants it (shape, dtype, sharding), and its record."""
        step = self.latest if step is None else step
        if step is None:
            raise ValueError(f"there is no checkpoint in {self._checkpointer.directory} to resume from")
        tree = self._checkpointer.load(step, abstract, checkpointable_name=NAME)
        record = self._checkpointer.metadata(step).custom_metadata
        assert isinstance(record, dict)
        return tree, record

    def wait(self) -> None:
        self._checkpointer.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._checkpointer.close()


class Stored(Mapping):
    """The arrays of one checkpoint on the host, "trained/params/dit/..." -> array, each read when it is asked for.

    step: the newest if None; afterwards the one that was found. ValueError if there is none.
    """

    def __init__(self, folder: Path, step: int | None = None):
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        self._checkpointer = ocp.training.Checkpointer(folder.absolute(), context=context)
        steps = [found.step for found in self._checkpointer.checkpoints]
        if not steps or (step is not None and step not in steps):
            there = f"; there are {', '.join(map(str, steps))}" if steps else ""
            raise ValueError(f"there is no checkpoint {'' if step is None else f'of step {step} '}in {folder}{there}")
        self.step = max(steps) if step is None else step
        arrays = flatten(self._checkpointer.metadata(self.step).metadata)
        arrays = {name: leaf for name, leaf in arrays.items() if hasattr(leaf, "shape")}  # not the optimizer's tuples
        self.shapes = {name: tuple(leaf.shape) for name, leaf in arrays.items()}
        self.dtypes = {name: np.dtype(leaf.dtype) for name, leaf in arrays.items()}

    def read(self, names: list[str]) -> dict[str, np.ndarray]:
        """Several at once, which is faster."""
        wanted = unflatten({name: np.empty(self.shapes[name], self.dtypes[name]) for name in names})
        return flatten(self._checkpointer.load(self.step, wanted, checkpointable_name=NAME)) if names else {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
