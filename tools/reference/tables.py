"""Position tables, the timestep embedding and the audio slice tables."""

from collections.abc import Iterator

import numpy as np

from kavatar_jax.models.audio_adapter import SILENCE, slice_spans, slice_table
from kavatar_jax.nn.layers import timestep_embedding
from kavatar_jax.nn.rope import axis_angles, axis_sizes, rope_table, rotate
from tools.reference.synthetic_weights import Fixture

FIXTURES = ("tables",)
POSITIONS = np.array([0, 1, 2, 3, 5, 10, 20, 33, 51, 103, 511, 1023])


def run(fixture: Fixture) -> Iterator[tuple[str, np.ndarray]]:
    for name in fixture.meta["outputs"]:
        kind, _, what = name.partition("/")
        if kind == "rope":
            function, head = what.split("_")
            angles = np.concatenate([axis_angles(POSITIONS, size) for size in axis_sizes(int(head))], axis=-1)
            yield name, {"cos": np.cos, "sin": np.sin}[function](angles)
        elif kind.startswith("rope_apply"):
            yield name, _rotated(fixture, kind)
        elif kind == "sinusoid":
            yield name, np.asarray(timestep_embedding(np.float32(fixture.meta["sinusoid_timesteps"][what]), int(what)))
        elif what == "table":
            yield name, _slice_rows(fixture.expected(name))
        else:
            tokens, frames = map(int, what.split("_")[1:])
            yield name, np.where((rows := released_slices(tokens, frames)) == SILENCE, 0, rows + 1)


def released_slices(tokens: int, frames: int) -> np.ndarray:
    """`slice_table` as in the release, which puts silence last."""
    rows = slice_table(tokens, frames)
    return np.take_along_axis(rows, np.argsort(rows == SILENCE, axis=1, kind="stable"), axis=1)


def _rotated(fixture: Fixture, case: str) -> np.ndarray:
    x = fixture.inputs(case)["x"]
    angles = rope_table(*fixture.meta["cases"][case]["grid"], head=x.shape[-1])
    angles = np.pad(angles, ((0, x.shape[1] - len(angles)), (0, 0)))  # padding tokens are not rotated
    return np.asarray(rotate(x, np.cos(angles), np.sin(angles)))


def _slice_rows(listed: np.ndarray) -> np.ndarray:
    """Rows (tokens, frames, slice, first, last, how many are real) for the pairs that the reference lists."""
    rows = []
    for tokens, frames in dict.fromkeys((int(row[0]), int(row[1])) for row in listed):
        real = (slice_table(tokens, frames) != SILENCE).sum(axis=1)
        spans = slice_spans(tokens, frames)
        rows += [(tokens, frames, i, *span, count) for i, (span, count) in enumerate(zip(spans, real, strict=True))]
    return np.array(rows)
