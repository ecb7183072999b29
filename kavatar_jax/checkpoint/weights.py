"""A weights directory: `component/model.safetensors` and `component/config.json` for each network. Knows no model.

Parameter names in the files are our own paths, "blocks/self_attn/q/kernel", layers stacked. A component is written under
another name and renamed when it is whole, so that a directory that looks complete is complete.
"""

import contextlib
import dataclasses
import json
import shutil
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import jax
import ml_dtypes
import numpy as np

from kavatar_jax.checkpoint.bridge import (
    Mismatch,
    Row,
    Shape,
    Slot,
    flatten,
    gather,
    pieces,
    placements,
    reference_shapes,
    sources,
    unflatten,
)
from kavatar_jax.checkpoint.files import Parts, SafetensorsWriter, Tensors
from kavatar_jax.checkpoint.lora import Changes, Merged, add
from kavatar_jax.checkpoint.shards import Lazy
from kavatar_jax.types import Params, Report, silent

NO_CHANGES: Changes = {}
STORED = tuple(np.dtype(dtype) for dtype in (np.float32, ml_dtypes.bfloat16, np.float16))


def stored_dtypes(tensors: Tensors, rows: list[Row], abstract: Params, *, unused=()) -> dict[str, np.dtype]:
    """path -> the dtype that its reference tensors are in, after checking keys, shapes and dtypes; no tensor is read.

    A stack whose layers differ is kept in float32, which holds the others exactly. ValueError lists all that is amiss.
    """
    found: dict[str, set[np.dtype]] = {}
    odd = []
    for key, slots in placements(tensors.shapes, rows, abstract, unused=unused).items():
        odd += [f"{key} is {tensors.dtypes[key]}"] if tensors.dtypes[key] not in STORED else []
        for slot in slots:
            found.setdefault(slot.path, set()).add(tensors.dtypes[key])
    if odd:
        raise ValueError(f"{', '.join(odd)}; weights are {', '.join(map(str, STORED))}")
    return {path: dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32) for path, dtypes in found.items()}


def convert_component(
    tensors: Tensors, rows: list[Row], abstract: Params, config: Any, folder: Path, *,
    unused=(), changes: Changes = NO_CHANGES, source: str = "", report: Report = silent,
) -> set[str]:  # fmt: skip
    """Write reference tensors as a component, one at a time, in their own dtype -> which of ours hold NaN or Inf.

    changes: added to ours; source: the file they come from, noted in ours. ValueError as `stored_dtypes`, before anything
    is written.
    """
    dtypes = stored_dtypes(tensors, rows, abstract, unused=unused)
    wanted = flatten(abstract)
    assert dtypes.keys() == wanted.keys(), f"no row for {sorted(wanted.keys() - dtypes.keys())}"
    placed = placements(tensors.shapes, rows, abstract, unused=unused)
    total = sum(len(slots) for slots in placed.values())
    with replacing(folder) as partial:
        shapes = {path: (tuple(leaf.shape), dtypes[path]) for path, leaf in wanted.items()}
        with SafetensorsWriter(partial / "model.safetensors", shapes, {"source": source}) as writer:
            for done, (path, layer, values) in enumerate(pieces(tensors, placed), 1):
                found = changes.get(path, {}).get(layer)
                writer.write(path, add(values, found) if found else values, layer)
                del values  # it holds the file's memory
                report(folder.name, done, total)
        write_config(partial, config)
    return writer.broken


def as_reference(folder: Path, tensors: Tensors, rows: list[Row]) -> dict[str, Lazy]:
    """A component's tensors under the reference's names, in their own dtype, none of them read yet.

    ValueError lists those that the reference has no name for. Parts of one tensor in several dtypes become float32.
    """
    shapes = {path: Shape(shape) for path, shape in tensors.shapes.items()}
    try:
        found, reference = sources(rows, shapes), reference_shapes(rows, shapes)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be written so: {error}") from None

    def lazy(key: str, slots: list[Slot]) -> Lazy:
        dtypes = {tensors.dtypes[slot.path] for slot in slots}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        return Lazy(reference[key], dtype, lambda: gather(tensors, slots))

    return {key: lazy(key, slots) for key, slots in found.items()}


def copy_component(tensors: Parts, config: Any, folder: Path, *, source: str = "", report: Report = silent) -> set[str]:
    """Write tensors of ours as a component, a row of a stack at a time -> which of them hold NaN or Inf."""
    with replacing(folder) as partial:
        shapes = {name: (shape, tensors.dtypes[name]) for name, shape in tensors.shapes.items()}
        with SafetensorsWriter(partial / "model.safetensors", shapes, {"source": source}) as writer:
            for done, (name, shape) in enumerate(tensors.shapes.items(), 1):
                whole = tuple(slice(None) for _ in shape)
                for row in range(shape[0]) if len(shape) > 2 else ():
                    writer.write(name, tensors.part(name, (slice(row, row + 1), *whole[1:]))[0], row)
                if len(shape) <= 2:
                    writer.write(name, tensors.part(name, whole))
                report(folder.name, done, len(tensors.shapes))
        write_config(partial, config)
    return writer.broken


def save_component(params: Params, config: Any, folder: Path) -> None:
    """Write parameters that are at hand."""
    flat = flatten(params)
    with replacing(folder) as partial:
        shapes = {path: (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in flat.items()}
        with SafetensorsWriter(partial / "model.safetensors", shapes) as writer:
            for path, leaf in flat.items():
                writer.write(path, np.asarray(leaf))
        write_config(partial, config)


def load_component(
    folder: Path, abstract: Params, shardings: Params, *, unread: Iterable[str] = (), changes: Changes = NO_CHANGES
) -> Params:
    """The component's parameters as `abstract` wants them (shape, dtype), each device reading its own part of the file.

    unread: tensors that the file may hold beside them; changes: added to what is read.
    ValueError lists what is missing, left over or of another shape.
    """
    tensors, wanted = Merged(open_component(folder, abstract, unread=unread), changes), flatten(abstract)
    places = flatten(shardings)
    return unflatten({name: _place(tensors, name, leaf, places[name]) for name, leaf in wanted.items()})


def open_component(folder: Path, abstract: Params, *, unread: Iterable[str] = ()) -> Tensors:
    """The component's tensors, none read, after holding their names and shapes against `abstract`; as `load_component`."""
    tensors, wanted = Tensors(folder / "model.safetensors"), flatten(abstract)
    wrong = [f"{name} is {tensors.shapes[name]}, expected {tuple(leaf.shape)}" for name, leaf in wanted.items()
             if name in tensors and tensors.shapes[name] != tuple(leaf.shape)]  # fmt: skip
    missing, left = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys() - set(unread))
    if missing or left or wrong:
        raise ValueError(f"{folder} does not fit its config.json: {Mismatch(missing, left, wrong)}; convert it again")
    return tensors


def write_config(folder: Path, config: Any) -> None:
    described = {"kind": type(config).__name__, **dataclasses.asdict(config)}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path, *kinds: type) -> Any:
    """The dataclass in a component's config.json, one of `kinds`; the first where it does not say which.

    ValueError unless it has every field, no other, and of its type.
    """
    path, named = folder / "config.json", {kind.__name__: kind for kind in kinds}
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        kind = described.pop("kind", None) if isinstance(described, dict) else None
        if kind is not None and kind not in named:
            raise ValueError(f"it is a {kind}")
        return revive(described, named.get(kind, kinds[0]), "it")
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except ValueError as error:  # also what is no JSON and no text
        raise ValueError(
            f"{path} does not describe a {' or '.join(named)}: {error}. Another version wrote it; convert "
            f"{folder.name} again"
        ) from None


def revive(value: Any, kind: Any, where: str) -> Any:
    """A JSON value as a field's type: int, float, bool, str, tuple[X, ...], a dataclass, any of them or None.

    where: what it is, for the ValueError. Of several dataclasses the first that has all of its fields.
    """
    options = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and NoneType in options:
        return None
    options = [option for option in options if option is not NoneType]
    fits = (option for option in options[:-1] if isinstance(value, dict) and value.keys() <= _fields(option))
    kind = next(fits, options[-1])
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        types = {field.name: field.type for field in dataclasses.fields(kind)}
        # a field with a default came later than some directories; its default is what they were made with
        required = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
        unknown, missing = sorted(value.keys() - types.keys()), sorted(required - value.keys())
        if unknown or missing:
            parts = [f"{where} has no {', '.join(missing)}"] * bool(missing)
            raise ValueError("; ".join(parts + [f"{where} has an unknown {', '.join(unknown)}"] * bool(unknown)))
        return kind(**{name: revive(item, types[name], name) for name, item in value.items()})  # type: ignore
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        if len(kinds) == len(value):
            return tuple(revive(item, k, where) for item, k in zip(value, kinds, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {value!r}, not {getattr(kind, '__name__', kind)}")
    return value


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write into that bears its name only once the block has ended well; an older one gives way then."""
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _place(tensors: Merged, name: str, leaf, sharding: jax.sharding.Sharding) -> jax.Array:
    parts = {}  # devices that hold the same part share one reading of it

    def read(index):
        where = tuple((part.start, part.stop) for part in index)
        if where not in parts:
            parts[where] = tensors.part(name, index).astype(leaf.dtype, copy=False)
        return parts[where]

    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
