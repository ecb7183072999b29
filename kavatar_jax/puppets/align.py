"""Following a picture as it moves: a template and a family of warps go in, the best warp for each new frame comes out.

Gauss-Newton on robustly weighted colour differences (Lucas and Kanade 1981; Baker and Matthews 2004,
doi:10.1023/B:VISI.0000011205.11775.fd), from blurred to sharp, each frame beginning where the last one ended.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

Warp = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""params (P,) -> where N points are, (2, N) as (x, y) in pixels, and how each param moves them, (P, 2, N)."""

_BLURS = (3.0, 1.2)  # pixels, for a frame of 128
_STEPS = (6, 5)
_STILL = 0.003  # a step this small, in units of the usual change between frames, is the last
_HOMESICK = 0.04  # pull towards the start, against that towards the last frame: what is lost comes back in time
_NOISE = 0.012  # colour difference, of 1, below which residuals mean nothing


def pyramid(frame: np.ndarray) -> list[np.ndarray]:
    """A frame (H, W, 3) in [0, 1], blurred and less blurred: each (H, W, 9), colours and their slopes in x and y."""
    layers = []
    for blur in _BLURS:
        blur *= min(frame.shape[:2]) / 128
        soft = ndimage.gaussian_filter(frame, (blur, blur, 0), mode="nearest", truncate=2.5)
        down, across = np.gradient(soft, axis=(0, 1))
        layers.append(np.concatenate([soft, across, down], -1).astype(np.float32))
    return layers


def sample(image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(N, C) bilinear values of an (H, W, C) image at (2, N) places in pixels; outside, the edge goes on."""
    height, width, channels = image.shape
    x = np.clip(places[0] - 0.5, 0, width - 1.001)
    y = np.clip(places[1] - 0.5, 0, height - 1.001)
    left, top = x.astype(np.int64), y.astype(np.int64)
    fx, fy = (x - left).astype(np.float32)[:, None], (y - top).astype(np.float32)[:, None]
    flat = image.reshape(-1, channels)
    at = top * width + left
    upper = flat[at] * (1 - fx) + flat[at + 1] * fx
    lower = flat[at + width] * (1 - fx) + flat[at + width + 1] * fx
    return upper * (1 - fy) + lower * fy


class Follower:
    """Follows points of a template picture from frame to frame.

    layers: the template's pyramid; start: (P,) params whose warp gives the points' places in the template; spring: (P,)
    inverse variances that hold each param near its value in the last frame.
    """

    def __init__(self, layers: list[np.ndarray], warp: Warp, start: np.ndarray, *, spring: np.ndarray):
        places, _ = warp(start)
        self.wanted = [sample(layer[..., :3], places) for layer in layers]
        self.warp, self.home, self.spring = warp, np.asarray(start, np.float64), np.asarray(spring, np.float64)
        self.params = self.home

    def update(self, layers: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The params (P,) that fit the next frame, and their certainty (P,): inverse variances given this frame."""
        before = self.params
        information = np.zeros((len(before), len(before)))
        for layer, wanted, steps in zip(layers, self.wanted, _STEPS, strict=True):
            for _ in range(steps):
                change, information = self._step(layer, wanted, before)
                self.params = self.params + change
                if np.all(np.abs(change) * np.sqrt(self.spring) < _STILL):
                    break
        prior = np.diag(self.spring)
        return self.params, 1 / np.diag(np.linalg.inv(information + prior)) - self.spring

    def _step(self, layer, wanted, before):
        """One Gauss-Newton step: the change of params, and the information matrix of the picture alone."""
        height, width, _ = layer.shape
        places, moves = self.warp(self.params)
        moves = moves.astype(np.float32)
        inside = (places[0] > 0) & (places[0] < width) & (places[1] > 0) & (places[1] < height)
        seen = sample(layer, places)
        colours, slopes = seen[:, :3], seen[:, 3:].reshape(-1, 2, 3)
        gain = np.sum(colours[inside] * wanted[inside]) / (np.sum(wanted[inside] ** 2) + 1e-6)  # exposure may drift
        error = colours - gain * wanted
        size = np.sqrt(np.mean(error**2, 1))
        limit = 2 * np.median(size[inside]) + 0.03 if inside.any() else 1.0
        weight = inside / (1 + (size / limit) ** 2) ** 2
        jacobian = moves[:, 0, :, None] * slopes[:, 0] + moves[:, 1, :, None] * slopes[:, 1]
        noise = np.sum(weight * size**2) / (np.sum(weight) + 1e-6) + _NOISE**2
        weighted = (jacobian * weight[:, None]).reshape(len(moves), -1) / noise
        information = weighted @ jacobian.reshape(len(moves), -1).T
        held = self.spring * (self.params - before + _HOMESICK * (self.params - self.home))
        stiff = information + np.diag((1 + _HOMESICK) * self.spring)
        return -np.linalg.solve(stiff, weighted @ error.ravel() + held), information
