"""Clips whose latents and features were computed beforehand, in files: reading them. `prepare` writes them.

    about.json                       what was prepared, and from which config
    128x128x49/00000000.npz ...      one clip: a row of every field of a Batch, but for `condition` and `given`
In place of these a file has `conditions`, one for each of the `views` in about.json: [portrait, last], whether the given
first frame is the portrait, and whether a later frame, number `last`, is given too. Floats are stored in half precision.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from kavatar_jax.media.arrays import load_arrays
from kavatar_jax.training.config import Bucket, DataConfig


class Prepared:
    """Records are dicts of a clip's arrays, with `name` and `views`."""

    endless = False

    def __init__(self, config: DataConfig, bucket: Bucket):
        folder = Path(config.folder)
        self.views = [tuple(view) for view in _read_about(folder)["views"]]
        self._folder = folder / folder_name(bucket)
        self._files = sorted(self._folder.glob("*.npz"))
        if not self._files:
            known = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "nothing"
            raise ValueError(f"{folder} holds no clips of {self._folder.name}; it has {known}")
        missing = [view for view in views_of(config) if view not in self.views]
        if missing:
            raise ValueError(f"{folder} was prepared without the views (portrait, last) {missing}; prepare it again")

    def __len__(self) -> int:
        return len(self._files)

    def record(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        name = f"{self._folder.name}/{self._files[index].stem}"
        return {"name": name, "views": self.views, **load_arrays(self._files[index])}


def check_learning(config: DataConfig, live: frozenset[str]) -> None:
    """ValueError unless the clips hold the raw input of the encoders that learn, and features of those that do not."""
    prepared_for = _read_about(Path(config.folder))["learning"]
    wanted = sorted(live & {"text", "image", "speech"})
    if wanted != prepared_for:
        raise ValueError(
            f"{config.folder} was prepared for learning the encoders {prepared_for or 'none'}, and this run learns "
            f"{wanted or 'none'}; prepare it again with this run's config"
        )


def folder_name(bucket: Bucket) -> str:
    part = f"_of_{bucket.closeup}" if bucket.closeup > 1 else ""
    return f"{bucket.width}x{bucket.height}x{bucket.frames}{part}"


def views_of(config: DataConfig) -> list[tuple[bool, bool]]:
    """The (portrait, last) that a data config can draw."""
    portraits = [False] * (config.portrait < 1) + [True] * (config.portrait > 0)
    views = [(portrait, False) for portrait in portraits] * (config.first_last < 1)
    return views + [(False, True)] * (config.first_last > 0)


def _read_about(folder: Path) -> dict[str, Any]:
    if not (folder / "about.json").is_file():
        raise ValueError(f"{folder} has no about.json: nothing was prepared there, or preparing was cut short")
    return json.loads((folder / "about.json").read_text())
