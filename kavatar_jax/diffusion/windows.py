"""Sliding windows over a long latent video, and the weights that fuse their overlaps.

Windows start every `stride` latent frames and are all of one length, so that they are one batch. Within a step they read
only what the step before left behind; then neighbours are blended where they overlap. The state stays cut into windows
from the first step to the last, and fusing is an exchange between neighbours, never a gather of the video.
Source: dynamic weighted sliding windows, arXiv 2508.08248; Francis-Rings/StableAvatar,
wan/pipeline/wan_inference_long_pipeline.py.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Windows:
    """`count` windows of `length` latent frames, `stride` apart, over a video of `total` latent frames.

    slots: how many the batch holds; those past `count` are empty and weigh nothing.
    short_end: the last window ends where the video does, as released; else it runs over and the surplus is dropped.
    """

    total: int
    length: int
    stride: int
    slots: int
    short_end: bool = False

    @property
    def count(self) -> int:
        return max(1, 1 + -(-(self.total - self.length) // self.stride))

    @property
    def starts(self) -> np.ndarray:
        """First latent frame of every slot: (slots,)."""
        return np.arange(self.slots) * self.stride

    @property
    def valid(self) -> np.ndarray:
        """How many latent frames of every slot are real: (slots,)."""
        full = np.where(np.arange(self.slots) < self.count, self.length, 0)
        return np.minimum(full, np.maximum(self.total - self.starts, 0)) if self.short_end else full

    @property
    def padded_total(self) -> int:
        """Latent frames that the slots cover together."""
        return (self.slots - 1) * self.stride + self.length

    def split(self, video):
        """(padded_total, ...) -> (slots, length, ...)."""
        return video[self.starts[:, None] + np.arange(self.length)]

    def join(self, windows) -> np.ndarray:
        """Fused (slots, length, ...) -> (total, ...): the first window whole, then what each next one adds."""
        added = np.asarray(windows[1 : self.count, self.length - self.stride :])
        whole = np.concatenate([np.asarray(windows[0]), added.reshape(-1, *added.shape[2:])])
        return whole[: self.total]


def overlap_ramp(overlap: int, scheme: str) -> np.ndarray | None:
    """Weight of the later window over the overlap, 0 at its first frame and 1 at its last: (overlap,).

    "uniform" is linear; "log" is ln(1 + (e - 1) u), steeper at first; "fixed" is one half everywhere. None for "none", and
    where nothing overlaps: nothing is blended.
    """
    if scheme == "none" or not overlap:
        return None
    u = np.arange(overlap) / (overlap - 1)
    return {"uniform": u, "log": np.log1p((np.e - 1) * u), "fixed": np.full(overlap, 0.5)}[scheme]


def fusion_weights(windows: Windows, ramp: np.ndarray | None) -> np.ndarray:
    """How much of each frame of each window goes into the fused video: (slots, length) float32, 1 in sum at each frame.

    Windows are laid down from left to right, each blended over what is there by `ramp`, or simply over it if None
    (the first step of the released sampler). Any overlap is allowed, also one that three windows share.
    """
    weights = np.zeros((windows.slots, windows.length))
    reach = (windows.length - 1) // windows.stride
    for k, valid in enumerate(windows.valid):
        mine = np.ones(valid)
        if k and ramp is not None:
            mine[: len(ramp)] = ramp[:valid]
        for d in range(1, min(reach, k) + 1):
            shared = min(windows.length - d * windows.stride, valid)
            weights[k - d, d * windows.stride :][:shared] *= 1 - mine[:shared]
        weights[k, :valid] = mine
    return weights.astype(np.float32)


def fuse(windows_WT, weights_WT, stride: int):
    """Blend overlapping windows (W, T, ...): afterwards every window holds the fused video's frames."""
    length = windows_WT.shape[1]
    weighted = windows_WT * weights_WT.reshape(*weights_WT.shape, *(1,) * (windows_WT.ndim - 2))
    fused = weighted
    for d in range(1, (length - 1) // stride + 1):
        shift = d * stride
        later, earlier = _neighbour(weighted, d), _neighbour(weighted, -d)
        fused = fused.at[:, shift:].add(later[:, : length - shift])
        fused = fused.at[:, : length - shift].add(earlier[:, shift:])
    return fused


def slot_bucket(count: int, *, multiple: int) -> int:
    """The number of slots for `count` windows: one of few sizes, so that few programs are compiled.

    Sizes are `multiple` times 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most a third of a bucket is empty.
    """
    size = 1
    while size * multiple < count:
        size += 1 if size < 4 else 1 << (size.bit_length() - 2)
    return size * multiple


def _neighbour(windows, d: int):
    """Window k gets window k + d, zeros past either end."""
    if abs(d) >= windows.shape[0]:
        return jnp.zeros_like(windows)
    zeros = jnp.zeros_like(windows[: abs(d)])
    return jnp.concatenate([windows[d:], zeros]) if d > 0 else jnp.concatenate([zeros, windows[:d]])
