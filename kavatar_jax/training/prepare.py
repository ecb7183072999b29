"""Latents and features of many clips computed once and written to files, for training that need not wait for them."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import grain
import jax
import numpy as np

from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import batch_sharding
from kavatar_jax.training.config import Bucket, TrainConfig
from kavatar_jax.training.data import Clips, Records, Row, draw_last, pad, place
from kavatar_jax.training.export import export
from kavatar_jax.training.objective import Batch
from kavatar_jax.training.prepared import folder_name, views_of
from kavatar_jax.training.state import adopt, begin, drawn_anew, join
from kavatar_jax.training.tasks import open_task
from kavatar_jax.types import Report


def prepare(config: TrainConfig, out: Path, *, count: int, report: Report) -> None:
    """Write `count` clips of every bucket as the run `config` would see them; clips that are there already stay.

    Encoders that are drawn from chance are left in out/weights, for the run to begin from. To be run on one machine.
    config.data is the source the clips come from; afterwards train with the source
    "prepared" and the folder `out`. ValueError if a bucket's batch does not divide `count`.
    """
    data = config.data
    if data.source == "prepared" or config.task != "dit":
        raise ValueError("clips are prepared for the task 'dit' from the source 'puppets' or 'clips'")
    config = adopt(config)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    with jax.set_mesh(mesh):
        task = open_task(config, mesh)
        state, frozen, _ = begin(config, task.components, mesh)
        anew = (drawn_anew(config) & set(task.components)) - task.learning
        export(config.model, anew, join(state.trained, frozen), out / "weights", start=config.weights)
        encode = functools.partial(task.encode, task.prepare(frozen))
        views = views_of(data)
        for bucket in data.buckets:
            if count % bucket.batch:
                raise ValueError(f"{count} clips are no whole number of batches of {bucket.batch}")
            folder = out / folder_name(bucket)
            folder.mkdir(parents=True, exist_ok=True)
            done = len(list(folder.glob("*.npz"))) // bucket.batch * bucket.batch
            for serials, batch in _batches(config, bucket, task.row, views, done, count):
                _write(folder, serials, _encode_views(encode, batch, bucket, mesh))
                report(f"preparing {folder.name}", serials[-1] + 1, count)
    about = {
        "views": views,
        "learning": sorted(task.learning & {"text", "image", "speech"}),
        "data": dataclasses.asdict(data),
        "model": dataclasses.asdict(config.model),
    }
    (out / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def _batches(
    config: TrainConfig, bucket: Bucket, row: Row, views, first: int, count: int
) -> Iterator[tuple[range, list[Clips]]]:
    """(serial numbers, the clips once for each view), loaded ahead."""

    def load(serial: int) -> list[Clips]:
        rng = np.random.default_rng([config.data.seed, config.data.buckets.index(bucket), serial])
        record = records.take(serial, rng)
        if rng.random() < config.data.padding:
            record = pad(record, rng.uniform(0, config.data.padding_most, 4))
        number = draw_last(rng, bucket.frames)
        return [row(record, portrait, number if last else 0) for portrait, last in views]

    records = Records(config.data, bucket, config.model)
    options = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=config.data.ahead * bucket.batch)
    stream = iter(grain.MapDataset.range(first, count).map(load).to_iter_dataset(options))
    for start in range(first, count, bucket.batch):
        rows = [next(stream) for _ in range(bucket.batch)]
        stacked = [jax.tree.map(lambda *x: np.stack(x), *clips) for clips in zip(*rows, strict=True)]
        yield range(start, start + bucket.batch), stacked


def _encode_views(encode, clips: list[Clips], bucket: Bucket, mesh) -> dict[str, np.ndarray]:
    """The fields of a Batch on the host; `conditions` (B, views, ...) and `last` in place of `condition` and `given`."""
    rows, sharding = np.arange(bucket.batch), batch_sharding(mesh)
    batches: list[Batch] = [jax.device_get(encode(place(view, rows, bucket.batch, sharding))) for view in clips]
    fields = {
        name: x for name, x in batches[0]._asdict().items() if name not in ("condition", "given") and x is not None
    }
    last = np.max([view.last for view in clips], axis=0)
    return fields | {"conditions": np.stack([batch.condition for batch in batches], axis=1), "last": last}


def _write(folder: Path, serials: range, fields: dict[str, np.ndarray]) -> None:
    for i, serial in enumerate(serials):
        partial = folder / f".{serial:08d}.partial"
        with open(partial, "wb") as file:
            np.savez_compressed(file, **{name: _half(x[i]) for name, x in fields.items()})
        os.replace(partial, folder / f"{serial:08d}.npz")


def _half(x: np.ndarray) -> np.ndarray:
    """Features in half precision; what an encoder is still to read, as it is."""
    return x.astype(np.float16) if x.dtype == np.float32 and x.ndim > 1 else x
