"""Weights and inputs from an integer hash, for values recorded without any file: a shape and a number in, an array out.

Element n of tensor j (C order) is twice a 32-bit mix of n + 0x9E3779B9 (j + 1), as a fraction, minus one. The mix is
MurmurHash3's finaliser. A state dict is filled in the order of its sorted keys.
"""

from collections.abc import Iterable, Mapping

import numpy as np


def uniform(shape: tuple[int, ...], number: int) -> np.ndarray:
    """float64 in [-1, 1) that depend on the position and the tensor's number alone."""
    h = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64) + np.uint64(0x9E3779B9 * (number + 1))
    h = h.astype(np.uint32)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return (2.0 * h / 2.0**32 - 1.0).reshape(shape)


def weights(shapes: Mapping[str, tuple[int, ...]], *, gains: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """A state dict: gains near one, matrices of unit gain, other vectors small, all float32.

    gains: further keys that scale a norm's output, where their names do not tell.
    """
    filled = {}
    for number, key in enumerate(sorted(shapes)):
        u, shape = uniform(shapes[key], number), shapes[key]
        gain = key.endswith(("gamma", "original0")) or ("norm" in key and key.endswith(".weight")) or key in gains
        matrix = np.sqrt(3 / np.prod(shape[1:])) if len(shape) >= 2 else 0.1
        filled[key] = (1 + 0.1 * u if gain else u * matrix).astype(np.float32)
    return filled


def draw(shape: tuple[int, ...], number: int) -> np.ndarray:
    """Input `number` of a recorded case: float32 in [-1.5, 1.5)."""
    return (1.5 * uniform(shape, 1000 + number)).astype(np.float32)
