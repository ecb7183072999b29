"""What is in a checkpoint, and how two differ: python tools/inspect_checkpoint.py PATH [OTHER]

PATH is a file of tensors (.safetensors, .pt, .pth, .bin), a folder of them, such as the shards of one network, or a tree of
folders, such as our own weights directory. Prints every tensor's name, shape, type, root mean square and largest value, and
the parameters of each folder; NaN and Inf are flagged. With --mesh DATA FSDP CONTEXT TENSOR also how each parameter of our
own weights directory would lie on such a mesh, and what a device would hold. With OTHER the differences instead: exit 1 if
there are any. With --verify every file is held against the hashes in PATH/kavatar.json: exit 1 if one has changed, is
missing or is not known there.

One tensor is read at a time. Exit 2 if a file cannot be read.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from rich.console import Console
from rich.table import Table

from kavatar_jax.checkpoint.bridge import flatten
from kavatar_jax.checkpoint.files import TORCH_SUFFIXES, Tensors
from kavatar_jax.checkpoint.manifest import verify
from kavatar_jax.checkpoint.weights import read_config
from kavatar_jax.models.components import COMPONENTS, abstract, model_of
from kavatar_jax.parallel.mesh import AXES
from kavatar_jax.parallel.sharding import partition

SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
PIECE = 1 << 22  # numbers looked at together


class Numbers(NamedTuple):
    """Of one tensor. rms: root mean square; largest: of absolute values; broken: how many are NaN or infinite."""

    rms: float
    largest: float
    broken: int


class Difference(NamedTuple):
    """Of one tensor in two checkpoints. what: how they differ; relative: rms of the difference to that of the first."""

    name: str
    what: str
    largest: float = math.nan
    relative: float = math.nan


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--mesh", type=int, nargs=4, metavar=tuple(axis.upper() for axis in AXES))
    parser.add_argument(
        "--match", default="", help="only tensors whose FOLDER/NAME this regular expression is found in"
    )
    parser.add_argument("--verify", action="store_true", help="only hold the files against their hashes")
    parser.add_argument("--summary", action="store_true", help="only the table of folders; no tensor is read")
    arguments = parser.parse_args(words)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if arguments.verify:
            problems = verify(arguments.path)
            console.print("\n".join(problems) or "every file is as it was written", markup=False, soft_wrap=True)
            return 1 if problems else 0
        pattern = _pattern(arguments.match)
        groups = open_checkpoint(arguments.path)
        if arguments.other is not None:
            found = list(differences(groups, open_checkpoint(arguments.other), pattern))
            console.print(_difference_table(found) if found else "no difference")
            return 1 if found else 0
        places = lay_out(arguments.path, groups, arguments.mesh) if arguments.mesh else {}
        if not arguments.summary:
            for table in _tensor_tables(groups, places, pattern):
                console.print(table)
        console.print(_summary(groups, places))
    except ValueError as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


def open_checkpoint(path: Path) -> dict[str, Tensors]:
    """The tensors of each folder under a path, by its name from there; "." is the path itself. Nothing is read yet."""
    if path.is_file():
        return {".": Tensors(path)}
    if not path.is_dir():
        raise ValueError(f"there is no {path}")
    folders: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix in SUFFIXES and not file.name.startswith("."):
            folders.setdefault(str(file.parent.relative_to(path)), []).append(file)
    if not folders:
        raise ValueError(f"{path} holds no file of tensors; those end in {', '.join(SUFFIXES)}")
    return {name: Tensors(*files) for name, files in folders.items()}


def measure(values: np.ndarray) -> Numbers:
    """Without a copy of the whole; NaN and Inf are counted and left out."""
    total, largest, broken = 0.0, 0.0, 0
    for piece in _pieces(values):
        finite = piece[np.isfinite(piece)]
        broken += len(piece) - len(finite)
        total += float(np.square(finite).sum())
        largest = max(largest, float(np.abs(finite).max(initial=0)))
    return Numbers(math.sqrt(total / max(values.size - broken, 1)), largest, broken)


def differences(groups: dict[str, Tensors], others: dict[str, Tensors], pattern: re.Pattern) -> Iterator[Difference]:
    """Names that one lacks, then shapes and types, then numbers that are not equal bit for bit."""
    one, two = _by_name(groups, pattern), _by_name(others, pattern)
    yield from (Difference(name, "only in the first") for name in sorted(one.keys() - two.keys()))
    yield from (Difference(name, "only in the second") for name in sorted(two.keys() - one.keys()))
    for name in sorted(one.keys() & two.keys()):
        (mine, key), (theirs, other_key) = one[name], two[name]
        if mine.shapes[key] != theirs.shapes[other_key]:
            yield Difference(name, f"{mine.shapes[key]} and {theirs.shapes[other_key]}")
            continue
        types = {str(mine.dtypes[key]), str(theirs.dtypes[other_key])}
        largest, total, square = _apart(mine[key], theirs[other_key])
        if len(types) == 2 or largest or math.isnan(largest):
            what = "numbers" if len(types) == 1 else f"{mine.dtypes[key]} and {theirs.dtypes[other_key]}"
            yield Difference(name, what, largest, math.sqrt(total / square) if square else math.inf if total else 0.0)


def lay_out(path: Path, groups: dict[str, Tensors], sizes: list[int]) -> dict[str, dict[str, NamedSharding]]:
    """Where every parameter of our weights directory would lie on a mesh of these sizes, by component and name."""
    if not all(size > 0 for size in sizes):
        raise ValueError(f"--mesh {' '.join(map(str, sizes))}: sizes are above 0")
    mesh = AbstractMesh(tuple(sizes), AXES)
    found = {}
    for name, component in COMPONENTS.items():
        if (path / name / "config.json").is_file():
            config = read_config(path / name, *component.kinds)
            wanted = abstract(name, config)
            shapes = {key: leaf.shape for key, leaf in flatten(wanted).items()}
            if shapes != (groups[name].shapes if name in groups else {}):
                raise ValueError(f"the tensors of {path / name} are not those that its config.json describes")
            found[name] = flatten(partition(wanted, model_of(name, config).AXES, mesh))
    if not found:
        raise ValueError(f"--mesh needs our own weights directory, and {path} is none; convert it first")
    return found


def _by_name(groups: dict[str, Tensors], pattern: re.Pattern) -> dict[str, tuple[Tensors, str]]:
    names = ((_full(folder, key), tensors, key) for folder, tensors in groups.items() for key in tensors)
    return {name: (tensors, key) for name, tensors, key in names if pattern.search(name)}


def _apart(one: np.ndarray, two: np.ndarray) -> tuple[float, float, float]:
    """The largest difference, NaN if only one is NaN; the sum of squared differences; that of the first's squares."""
    largest, total, square = 0.0, 0.0, 0.0
    for mine, theirs in zip(_pieces(one), _pieces(two), strict=True):
        same = (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))
        apart = np.subtract(mine, theirs, out=np.zeros_like(mine), where=~same)
        largest = float(np.maximum(largest, np.abs(apart).max(initial=0)))
        total, square = total + float(np.square(apart).sum()), square + float(np.nansum(np.square(mine)))
    return largest, total, square


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    flat = values.reshape(-1)
    for start in range(0, len(flat), PIECE):
        yield flat[start : start + PIECE].astype(np.float64)


def _tensor_tables(groups, places, pattern: re.Pattern) -> Iterator[Table]:
    for folder, tensors in groups.items():
        placed = places.get(folder, {})
        table = Table("name", "shape", "type", "rms", "largest", title=folder, title_justify="left")
        if placed:
            table.add_column("on the mesh")
            table.add_column("a device holds")
        for key in tensors:
            if not pattern.search(_full(folder, key)):
                continue
            numbers = measure(tensors[key])
            flag = f" [red]{numbers.broken} NaN or Inf" if numbers.broken else ""
            row = [key, _shape(tensors.shapes[key]), str(tensors.dtypes[key])]
            row += [f"{numbers.rms:.4g}", f"{numbers.largest:.4g}{flag}"]
            if placed:
                part = placed[key].shard_shape(tensors.shapes[key])
                row += [_spec(placed[key]), _bytes(math.prod(part) * tensors.dtypes[key].itemsize)]
            table.add_row(*row)
        if table.row_count:
            yield table


def _summary(groups: dict[str, Tensors], places) -> Table:
    table = Table("folder", "tensors", "parameters", "size", "types", title="in all", title_justify="left")
    if places:
        table.add_column("a device holds")
    for folder, tensors in groups.items():
        counts = {key: math.prod(shape) for key, shape in tensors.shapes.items()}
        size = sum(count * tensors.dtypes[key].itemsize for key, count in counts.items())
        types = ", ".join(sorted({str(dtype) for dtype in tensors.dtypes.values()}))
        row = [folder, f"{len(tensors):,}", f"{sum(counts.values()):,}", _bytes(size), types]
        if places:
            parts = {
                key: math.prod(place.shard_shape(tensors.shapes[key])) for key, place in places.get(folder, {}).items()
            }
            held = sum(count * tensors.dtypes[key].itemsize for key, count in parts.items())
            row.append(_bytes(held))
        table.add_row(*row)
    return table


def _difference_table(found: list[Difference]) -> Table:
    table = Table("name", "difference", "largest", "relative", title=f"{len(found)} differ", title_justify="left")
    for one in found:
        numbers = ["" if math.isnan(x) and one.what != "numbers" else f"{x:.3g}" for x in (one.largest, one.relative)]
        table.add_row(one.name, one.what, *numbers)
    return table


def _full(folder: str, key: str) -> str:
    return key if folder == "." else f"{folder}/{key}"


def _pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"--match {text}: {error}") from None


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.3f} MiB"


def _spec(place: NamedSharding) -> str:
    names = ("-" if axis is None else "+".join(axis) if isinstance(axis, tuple) else axis for axis in place.spec)
    return ", ".join(names)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
