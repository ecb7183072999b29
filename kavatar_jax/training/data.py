"""From sources to batches on the mesh: every process loads the rows that its own devices hold, ahead of time.

Batch number n is a pure function of the config and n, on any number of processes, so the position of a run in its data is
one number, and a run that resumes, on whatever mesh, goes on with the very next batch.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags

from kavatar_jax.config import Config
from kavatar_jax.media.image import resize
from kavatar_jax.media.text import Tokenizer
from kavatar_jax.models import clip
from kavatar_jax.models.components import model_of
from kavatar_jax.parallel.sharding import batch_sharding, batch_slots
from kavatar_jax.training.config import Bucket, DataConfig
from kavatar_jax.training.objective import Batch
from kavatar_jax.training.sources import open_source


class Clips(NamedTuple):
    """A batch of clips as they are recorded; a field that the model does not use is None.

    video: (B, F, H, W, 3) uint8; face, lip: (B, F, H, W) uint8, 255 inside
    reference: (B, H, W, 3) uint8 given as first frame; last: (B,) int32, the later frame that is given too, 0 for none
    ids: (B, L) tokens; samples: (B, n) normalised; pixels: (B, S, S, 3) for the image encoder; director: (B, L, D)
    """

    video: Any
    face: Any
    lip: Any
    reference: Any | None = None
    last: Any | None = None
    ids: Any | None = None
    samples: Any | None = None
    pixels: Any | None = None
    director: Any | None = None


Row = Callable[[dict[str, Any], bool, int], Clips]  # record, whether its portrait is given, `last` as in Clips


class Loaded(NamedTuple):
    """number: of the batch; bucket: its size; names: of this process's records; clips: global arrays over the mesh."""

    number: int
    bucket: Bucket
    names: list[str]
    clips: Clips | Batch


class Loader:
    """Batches from `position` on, without end."""

    def __init__(self, config: DataConfig, row: Row, model: Config, mesh, *, position: int = 0):
        self.position, self._config = position, config
        self._sharding = batch_sharding(mesh)
        for bucket in config.buckets:
            if bucket.batch % batch_slots(mesh):
                raise ValueError(
                    f"a batch of {bucket.batch} does not spread over data x fsdp = {batch_slots(mesh)} places; "
                    f"use a multiple of it"
                )
        sources = [_Batches(config, bucket, row, model, self.rows(bucket)) for bucket in config.buckets]
        batches = [grain.MapDataset.source(source) for source in sources]
        mixed = grain.MapDataset.mix(batches, [bucket.weight for bucket in config.buckets])
        # what decodes and renders is mostly ffmpeg and numpy, which let other threads run
        options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.ahead)
        stream = mixed[position:].to_iter_dataset(options)
        if config.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads some of its own, whether or not the program has any
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
        self._stream = iter(stream)

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        number, names, rows = next(self._stream)
        bucket, self.position = self._config.buckets[number], self.position + 1
        return Loaded(self.position - 1, bucket, names, place(rows, self.rows(bucket), bucket.batch, self._sharding))

    def rows(self, bucket: Bucket) -> np.ndarray:
        """The rows of a batch that this process's devices hold."""
        held = self._sharding.addressable_devices_indices_map((bucket.batch,)).values()
        return np.unique(np.concatenate([np.arange(bucket.batch)[index] for index in held if index is not None]))


def place(tree, rows: np.ndarray, batch: int, sharding):
    """Arrays of some rows of a batch -> global arrays over the mesh."""

    def put(leaf):
        def part(index):
            return leaf[np.searchsorted(rows, np.arange(batch)[index[0]])]

        return jax.make_array_from_callback((batch, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)


class Records:
    """A source in an order that has no end: record number `serial`, whatever was taken before."""

    def __init__(self, config: DataConfig, bucket: Bucket, model: Config):
        self._bucket = bucket
        self._source = open_source(config, bucket, model)
        order = grain.MapDataset.range(len(self._source))
        if not self._source.endless:
            order = order.shuffle(seed=config.seed + config.buckets.index(bucket))  # anew each time round
        self._order = order.repeat()

    def take(self, serial: int, rng: np.random.Generator) -> dict[str, Any]:
        record = self._source.record(int(self._order[serial]), rng)
        whole = self._bucket.closeup > 1 and "video" in record  # prepared ones have been cut already
        return close_up(record, self._bucket, rng) if whole else record


class _Batches:
    """A source of batches: (number of the bucket, names, rows)."""

    def __init__(self, config: DataConfig, bucket: Bucket, row: Row, model: Config, rows: np.ndarray):
        self._config, self._bucket, self._row, self._rows = config, bucket, row, rows
        self._number = config.buckets.index(bucket)
        self._records = Records(config, bucket, model)

    def __len__(self) -> int:
        return sys.maxsize // self._bucket.batch

    def __getitem__(self, index: int):
        serials = index * self._bucket.batch + self._rows
        rows = [self._compose(int(serial)) for serial in serials]
        names = [name for name, _ in rows]
        return self._number, names, jax.tree.map(lambda *leaves: np.stack(leaves), *[row for _, row in rows])

    def _compose(self, serial: int):
        rng = np.random.default_rng([self._config.seed, self._number, serial])
        config, record = self._config, self._records.take(serial, rng)
        portrait, last = bool(rng.random() < config.portrait), 0
        if rng.random() < config.first_last:
            portrait, last = False, draw_last(rng, self._bucket.frames)  # clips between two frames begin with their own
        if "views" in record:
            return record["name"], _prepared_row(record, portrait, last)
        if rng.random() < config.padding:
            record = pad(record, rng.uniform(0, config.padding_most, 4))
        return record["name"], self._row(record, portrait, last)


def draw_last(rng: np.random.Generator, frames: int) -> int:
    """A frame to be given beside the first: the last of any later latent; 0 in a clip of one."""
    latents = (frames - 1) // 4
    return 4 * int(rng.integers(1, latents + 1)) if latents else 0


def clip_row(record: dict[str, Any], portrait: bool, last: int, *, model: Config, tokenizer: Tokenizer) -> Clips:
    """One record as a row of Clips."""
    reference = record.get("portrait", record["video"][0]) if portrait else record["video"][0]
    pixels = samples = None
    if model.dit.audio is not None:
        samples = model_of("speech", model.speech).normalise(record["samples"])
    if model.dit.image_width is not None:
        pixels = clip.preprocess(reference[None].astype(np.float32) / 127.5 - 1, model.image)[0]
    return footage_row(record, portrait, last)._replace(
        reference=reference,
        last=np.int32(last),
        ids=tokenizer([record["prompt"]], model.dit.text_length)[0][0],
        samples=samples,
        pixels=pixels,
        director=record.get("director") if model.dit.director_width is not None else None,
    )


def footage_row(record: dict[str, Any], portrait: bool, last: int) -> Clips:
    """Only the pictures and their masks, which is all that the autoencoder learns from."""
    return Clips(video=record["video"], face=_to_bytes(record["face"]), lip=_to_bytes(record["lip"]))


def close_up(record: dict[str, Any], bucket: Bucket, rng: np.random.Generator) -> dict[str, Any]:
    """The part of the bucket's size around where the mouth is on the whole, off its middle by up to an eighth."""
    lip, corner = _to_bytes(record["lip"]).astype(np.float32).sum(axis=0), []
    for axis, size in enumerate((bucket.height, bucket.width)):
        shares = lip.sum(axis=1 - axis)
        middle = np.average(np.arange(len(shares)), weights=shares) if shares.any() else len(shares) / 2
        start = middle - size / 2 + rng.uniform(-size / 8, size / 8)
        corner.append(int(np.clip(round(start), 0, len(shares) - size)))
    top, left = corner
    part = np.s_[..., top : top + bucket.height, left : left + bucket.width]
    cut = {name: record[name][part] for name in ("face", "lip")}
    for name in {"video", "portrait"} & record.keys():
        cut[name] = record[name][(*part, np.s_[:])]
    return record | cut


def pad(record: dict[str, Any], sides: np.ndarray) -> dict[str, Any]:
    """The clip made smaller, with black around it. sides: left, right, top, bottom, as shares of the frame."""
    frames, height, width, _ = record["video"].shape
    left, right, top, bottom = (np.asarray(sides) * (width, width, height, height)).astype(int)
    inner = (width - left - right, height - top - bottom)

    def shrink(image):
        grey = image.ndim == 2
        small = resize(np.repeat(image[..., None], 3, axis=2) if grey else image, inner)
        framed = np.zeros((height, width, 3), np.uint8)
        framed[top : height - bottom, left : width - right] = small
        return framed[..., 0] if grey else framed

    padded = {"video": np.stack([shrink(frame) for frame in record["video"]])}
    for name in ("face", "lip"):
        padded[name] = np.stack([shrink(mask) for mask in _to_bytes(record[name])])
    if "portrait" in record:
        padded["portrait"] = shrink(record["portrait"])
    return record | padded


def _to_bytes(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255 if mask.dtype == bool else mask


def _prepared_row(record: dict[str, Any], portrait: bool, last: int) -> Batch:
    """The later frame that is given is the one that was drawn when the clip was prepared."""
    condition = record["conditions"][record["views"].index((portrait, last > 0))]
    frames = len(condition)
    given = np.zeros((frames, 4), np.float32)
    given[0] = 1
    if last:
        given.reshape(-1)[record["last"] + 3] = 1
    stored = {name: record[name] for name in Batch._fields if name in record}
    stored = {n: x.astype(np.float32) if x.dtype == np.float16 else x for n, x in stored.items()}
    return Batch(condition=condition.astype(np.float32), given=given, **stored)
