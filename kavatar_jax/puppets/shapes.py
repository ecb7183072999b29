"""Anti-aliased painting on a stack of frames: windows of pixel coordinates and coverages go in, blended colours come out.

Lengths are in world units (half the shorter side of the frame at zoom 1); x points right, y points down. A window is
one rectangle of pixels shared by all frames of the stack, so every operation is one numpy call for the whole stack.
Coverage is the part of a pixel inside a shape, in [0, 1], from its distance to the outline in pixels.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels. x, y: its coordinates, broadcastable to (F, h, w); px: (F, 1, 1) pixels per unit."""

    rows: slice
    cols: slice
    x: np.ndarray
    y: np.ndarray
    px: np.ndarray

    def moved(self, cx, cy, angle=0.0) -> "Window":
        """The same pixels, seen from the origin (cx, cy) in axes turned clockwise by `angle` radians."""
        x, y = self.x - cx, self.y - cy
        if np.ndim(angle) == 0 and angle == 0.0:
            return Window(self.rows, self.cols, x, y, self.px)
        c, s = np.cos(angle), np.sin(angle)
        return Window(self.rows, self.cols, x * c + y * s, y * c - x * s, self.px)


class Canvas:
    """A stack of frames under a camera. rgb: (3, F, H, W) float32, 0..255; zoom, pan_x, pan_y: (F, 1, 1)."""

    def __init__(self, rgb: np.ndarray, zoom: np.ndarray, pan_x: np.ndarray, pan_y: np.ndarray):
        _, _, height, width = rgb.shape
        self.rgb = rgb
        self.px = (zoom * (min(height, width) / 2)).astype(np.float32)
        self.x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / self.px + pan_x  # (F, 1, W)
        self.y = (np.arange(height, dtype=np.float32)[:, None] + 0.5 - height / 2) / self.px + pan_y  # (F, H, 1)

    def window(self, x, y, reach_x, reach_y=None) -> Window:
        """The pixels within reach of the points (x, y), which may differ from frame to frame."""
        reach_y = reach_x if reach_y is None else reach_y
        cols = _span(self.x, x, reach_x)
        rows = _span(self.y, y, reach_y)
        return Window(rows, cols, self.x[:, :, cols], self.y[:, rows], self.px)

    def paint(self, window: Window, coverage: np.ndarray, colour, shade=1.0):
        """Blend a colour (3,) times a shade, scalar or (F, h, w), over the window's pixels."""
        for channel, value in zip(self.rgb, colour, strict=True):
            view = channel[:, window.rows, window.cols]
            change = np.float32(value) * shade - view
            change *= coverage
            view += change


def disc(x, y, rx, ry, px) -> np.ndarray:
    """Coverage of an ellipse centred at the origin, exact to first order in the distance (gradient-normalised)."""
    u, v = x / rx, y / ry
    k = u * u + v * v
    slope = np.sqrt((u / rx) ** 2 + (v / ry) ** 2) + 1e-6
    return soft((1.0 - k) / (2.0 * slope), px)


def ring(x, y, radius, thickness, px) -> np.ndarray:
    """Coverage of a circular line."""
    return soft(thickness / 2 - np.abs(np.sqrt(x * x + y * y) - radius), px)


def stroke(x, y, x0, y0, x1, y1, radius, px) -> np.ndarray:
    """Coverage of a straight line with round ends."""
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
    return soft(radius - np.sqrt((x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2), px)


def between(y, top, bottom, px) -> np.ndarray:
    """Coverage of the band between two curves y = top(x) and y = bottom(x); zero where bottom is above top."""
    covered = np.clip((y - top) * px + 0.5, 0, 1) - np.clip((y - bottom) * px + 0.5, 0, 1)
    return np.maximum(covered, 0, out=covered)


def soft(depth, px) -> np.ndarray:
    """Coverage from the depth inside an outline (negative outside), over one pixel."""
    depth = depth * px
    depth += 0.5
    return np.clip(depth, 0, 1, out=depth)


def step(value, low: float, high: float) -> np.ndarray:
    """A smooth step from 0 at `low` to 1 at `high` (cubic)."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _span(axis, at, reach) -> slice:
    """The pixels of a monotone axis, in any frame, that lie within reach of that frame's point."""
    near = np.any(np.abs(axis - at) <= reach, axis=0).ravel()
    found = np.flatnonzero(near)
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)
