"""Tensors in the files of other programs: one .safetensors, shards with an index as Hugging Face lays them out, or .pt.

What is written gets its tensors one at a time, each made when its turn comes.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from kavatar_jax.checkpoint.files import TORCH_SUFFIXES, SafetensorsWriter, Tensors, read_json
from kavatar_jax.types import Report, silent

FORMAT = {"format": "pt"}  # transformers reads no safetensors that do not say so


class Lazy(NamedTuple):
    """A tensor that is yet to be read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def is_there(path: Path) -> bool:
    """Whether there is this file, or the index of its shards."""
    return path.is_file() or _index(path).is_file()


def open_tensors(path: Path) -> Tensors:
    """The tensors of a file, or, where NAME.index.json lies in its place, of the shards that it names.

    ValueError if a shard is missing or not beside the index, or if index and shards do not agree on a tensor.
    """
    index = _index(path)
    if path.is_file() or not index.is_file():
        return Tensors(path)
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise ValueError(f"{index} has no weight_map")
    files = sorted(set(map(str, homes.values())))
    outside = [name for name in files if not re.fullmatch(rf"[\w-][\w.-]*{re.escape(path.suffix)}", name)]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}; a shard is a {path.suffix} file beside it")
    absent = [name for name in files if not (path.parent / name).is_file()]
    if absent:
        raise ValueError(f"{index} names shards that are not there: {', '.join(absent)}")
    tensors = Tensors(*(path.parent / name for name in files))
    wrong = sorted(homes.keys() ^ tensors.keys())
    wrong += sorted(key for key in homes.keys() & tensors.keys() if tensors.file_of(key).name != homes[key])
    if wrong:
        raise ValueError(f"{index} and its shards do not agree on where {', '.join(wrong)} is")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Lazy], *, shard_size: int, report: Report = silent) -> set[str]:
    """Write one file, or, of more than `shard_size` bytes of safetensors, shards and an index; the names of those with
    NaN or Inf are returned. A .pt or .pth is one file, a dict of torch tensors.
    """
    if path.suffix in TORCH_SUFFIXES:
        return _write_torch(path, tensors, report)
    shards = _divide(tensors, shard_size)
    names = [path.name] if len(shards) == 1 else [
        f"{path.stem}-{n:05}-of-{len(shards):05}{path.suffix}" for n in range(1, len(shards) + 1)
    ]  # fmt: skip
    broken, done = set(), 0
    for name, keys in zip(names, shards, strict=True):
        with SafetensorsWriter(path.with_name(name), {key: tensors[key][:2] for key in keys}, FORMAT) as writer:
            for key in keys:
                writer.write(key, tensors[key].read())
                done += 1
                report(path.name, done, len(tensors))
        broken |= writer.broken
    if len(shards) > 1:
        homes = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        described = {"metadata": {"total_size": sum(map(_bytes, tensors.values()))}, "weight_map": homes}
        _index(path).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return broken


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


def _divide(tensors: Mapping[str, Lazy], limit: int) -> list[list[str]]:
    """Keys in their order, cut where a shard would grow beyond the limit; a larger tensor has one to itself."""
    shards, size = [[]], 0
    for key, tensor in tensors.items():
        if shards[-1] and size + _bytes(tensor) > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += _bytes(tensor)
    return shards


def _bytes(tensor: Lazy) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


def _write_torch(path: Path, tensors: Mapping[str, Lazy], report: Report) -> set[str]:
    """By way of a safetensors file that is mapped: torch wants all tensors at once, and this keeps them out of memory."""
    try:
        import torch
    except ImportError:
        raise ValueError(f"writing {path.name} needs torch: pip install 'kavatar-jax[torch]'") from None
    stage, partial = path.with_name(f".{path.name}.safetensors"), path.with_name(f".{path.name}.partial")
    try:
        broken = write_tensors(stage, tensors, shard_size=sum(map(_bytes, tensors.values())), report=report)
        mapped, state = Tensors(stage), {}
        for key in tensors:
            values = mapped[key]
            with warnings.catch_warnings(action="ignore"):  # torch remarks that a mapped file cannot be written to
                if values.dtype == ml_dtypes.bfloat16:
                    state[key] = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
                else:
                    state[key] = torch.from_numpy(values)
        torch.save(state, partial)
        os.replace(partial, path)
    finally:
        stage.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return broken
