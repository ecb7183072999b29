"""Tensors in files: safetensors and torch files read lazily as numpy, safetensors written piece by piece.

Files are mapped into memory, and mapped again every so often, so that what has been read can leave memory.
"""

import abc
import contextlib
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from kavatar_jax.checkpoint.bridge import contiguous

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
REMAP_AFTER = 2**28  # bytes read
PIECE = 2**22  # numbers looked at together
_CODES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): code for code, dtype in _CODES.items()}


class Parts(Mapping):
    """Tensors by name whose `shapes` and `dtypes` are known without reading them, each to be had whole or in part."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    @abc.abstractmethod
    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of a slice of one tensor; no more is read than it needs."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self.part(name, (slice(None),) * len(self.shapes[name]))

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Tensors(Parts):
    """The tensors of one file or of several shards, name -> array, each read when it is asked for.

    `shapes`, `dtypes` and the `metadata` of safetensors are known without reading. A torch file is opened with weights_only;
    a dict wrapped in "state_dict", as training scripts save it, is unwrapped. ValueError, in one line, if a file is absent,
    damaged or cut off, or holds anything but tensors.
    """

    def __init__(self, *paths: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.metadata: dict[str, str] = {}
        self._home = {}
        for path in paths:
            opened = _open(path)
            self.metadata |= opened.metadata
            for name, (shape, dtype) in opened.items():
                if name in self._home:
                    raise ValueError(f"{name} stands in two files; one is {path}")
                self.shapes[name], self.dtypes[name], self._home[name] = shape, dtype, (opened, name)

    def stripped(self, prefix: str) -> "Tensors":
        """The same tensors with names that begin with `prefix` without it."""
        found = Tensors()
        found.metadata = self.metadata
        for kept in ("shapes", "dtypes", "_home"):
            setattr(found, kept, {name.removeprefix(prefix): value for name, value in getattr(self, kept).items()})
        if len(found) < len(self):
            raise ValueError(f"some tensors are there both with {prefix} and without")
        return found

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, still in its file: not to be written to, and to be let go of soon."""
        opened, known = self._home[name]
        return opened.read(known)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        opened, known = self._home[name]
        return np.array(opened.read(known)[index], order="C")

    def file_of(self, name: str) -> Path:
        return self._home[name][0].path


class SafetensorsWriter:
    """A safetensors file of tensors known by name, shape and dtype, filled in any order through `write`.

    To be used in a `with` block: nothing bears the final name until it has ended well, nothing is left if it has not.
    `broken` names the tensors written so far that hold NaN or Inf.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], metadata: dict | None = None
    ):
        header: dict = {"__metadata__": {"format": "np", **(metadata or {})}}
        offset = 0
        # widest types first, so that every tensor is aligned to its items
        for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-np.dtype(item[1][1]).itemsize, item[0])):
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            span = [offset, offset + size]
            header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": span}
            offset += size
        blob = json.dumps(header).encode()
        blob += b" " * (-len(blob) % 8)
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._header, self._start, self._left = header, 8 + len(blob), offset
        self.broken: set[str] = set()
        self._file = open(self._partial, "wb")
        self._file.write(struct.pack("<Q", len(blob)) + blob)

    def write(self, name: str, values: np.ndarray, row: int | None = None) -> None:
        """Write a tensor, or one row of its first axis, once; in the dtype it was announced with."""
        entry = self._header[name]
        shape, offset = tuple(entry["shape"]), entry["data_offsets"][0]
        values = contiguous(np.asarray(values, _CODES[entry["dtype"]]))
        assert values.shape == (shape if row is None else shape[1:]), f"{name} is {shape}, not {values.shape}"
        self._file.seek(self._start + offset + (row or 0) * values.nbytes)
        flat = values.reshape(-1)
        self._file.write(flat.view(np.uint8).data)
        self._left -= values.nbytes
        if not all(np.isfinite(flat[start : start + PIECE]).all() for start in range(0, len(flat), PIECE)):
            self.broken.add(name)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                assert not self._left, f"{self._left} bytes of {self._path} were not written"
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._partial, self._path)
        finally:
            self._partial.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a full disk, which has been said
                self._file.close()


class _Safetensors:
    def __init__(self, path: Path):
        try:
            with safe_open(path, "numpy"):  # checks all of the header
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = parse_json(path, file.read(length))
        self.path, self._entries, self.metadata = path, {}, header.get("__metadata__", {})
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _CODES:
                raise ValueError(f"{path}: {name} is {entry['dtype']}; read are {', '.join(_CODES)}")
            start = 8 + length + entry["data_offsets"][0]
            self._entries[name] = tuple(entry["shape"]), np.dtype(_CODES[entry["dtype"]]), start

    def items(self):
        for name, (shape, dtype, _) in self._entries.items():
            yield name, (shape, dtype)

    def read(self, name: str) -> np.ndarray:
        shape, dtype, start = self._entries[name]
        if not all(shape):
            return np.empty(shape, dtype)  # nothing cannot be mapped
        return np.asarray(np.memmap(self.path, dtype, "r", start, shape or 1)).reshape(shape)


class _Torch:
    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path):
        self.path, self._state, self._read = path, _load_torch(path), 0
        self._mapped = zipfile.is_zipfile(path)

    def items(self):
        import torch

        for name, tensor in self._state.items():
            if tensor.dtype == torch.bfloat16:
                dtype = np.dtype(ml_dtypes.bfloat16)
            elif (dtype := getattr(np, str(tensor.dtype).removeprefix("torch."), None)) not in _CODES.values():
                raise ValueError(f"{self.path}: {name} is {tensor.dtype}; read are {', '.join(_CODES)}")
            yield name, (tuple(tensor.shape), np.dtype(dtype))

    def read(self, name: str) -> np.ndarray:
        import torch

        if self._mapped and self._read > REMAP_AFTER:
            self._state, self._read = {}, 0  # unmaps the file before it is mapped again
            self._state = _load_torch(self.path)
        tensor = self._state[name].detach()
        self._read += tensor.nbytes
        if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16 of its own: pass the bits
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if there is none, or if it says something twice."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return parse_json(path, path.read_bytes())


def parse_json(path: Path, text: bytes) -> dict:
    """As `read_json`, of what has been read from `path`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        twice = sorted({name for name, count in Counter(name for name, _ in pairs).items() if count > 1})
        if twice:
            raise ValueError(f"it says twice what {', '.join(twice)} is")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, perhaps a pointer to the file or a part of it: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where an object was expected")
    return value


def _open(path: Path) -> _Safetensors | _Torch:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix in TORCH_SUFFIXES:
        return _Torch(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is neither .safetensors nor a torch file ({', '.join(TORCH_SUFFIXES)})")
    return _Safetensors(path)


def _load_torch(path: Path) -> dict:
    try:
        import torch
    except ImportError:
        raise ValueError(f"reading {path.name} needs torch: pip install 'kavatar-jax[torch]'") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # remarks about old pickles
            # files from before torch 1.6 are no zip archives and cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle fails in as many ways as it has opcodes
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            raise ValueError(f"{path} holds code ({code[1]}) and is not loaded; only tensors are") from None
        raise ValueError(f"{path} is not a readable torch file: {_first_line(error)}") from None
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    odd = [] if isinstance(state, dict) else [type(state).__name__]
    odd += [] if odd else [name for name, value in state.items() if not _is_plain(value)]
    if odd:
        raise ValueError(f"{path} is not a state dict of tensors: it holds {', '.join(map(str, odd[:5]))}")
    return state


def _is_plain(value) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
