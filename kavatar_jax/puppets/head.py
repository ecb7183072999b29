"""The head as a ball: pixels of a window go in, the points of its surface that they show come out.

The face is an ellipsoid seen from far away; its features are drawn flat on the plane that the unturned face shows
(x, y in world units from the middle of the face), and turning the head carries them round with it.
"""

from dataclasses import dataclass

import numpy as np

from kavatar_jax.puppets.identity import Identity
from kavatar_jax.puppets.shapes import Canvas, Window
from kavatar_jax.puppets.state import Pose


@dataclass(frozen=True)
class Surface(Window):
    """Points of a ball. x, y: on the plane of the unturned face; z: depth, 1 at the front; cover: (F, h, w)."""

    z: np.ndarray
    cover: np.ndarray


class Head:
    """The head of an identity in a pose, on a canvas."""

    def __init__(self, canvas: Canvas, identity: Identity, pose: Pose):
        self.canvas, self.identity, self.pose = canvas, identity, pose
        self.px = canvas.px * pose.head_scale
        yaw, pitch = np.radians(pose.yaw), np.radians(pose.pitch)
        self.sin_yaw, self.cos_yaw = np.sin(yaw), np.cos(yaw)
        self.sin_pitch, self.cos_pitch = np.sin(pitch), np.cos(pitch)
        self.front = self.ball(self.window(0, 0, 1.06 * identity.face_width, 1.1 * identity.face_height))

    def window(self, x, y, reach_x, reach_y=None) -> Window:
        """Pixels within reach of a point of the head's own upright plane, in that plane's coordinates."""
        reach_y = reach_x if reach_y is None else reach_y
        scale, c, s = self.pose.head_scale, np.cos(self.pose.tilt), np.sin(self.pose.tilt)
        world_x = self.pose.head_x + scale * (c * x - s * y)
        world_y = self.pose.head_y + scale * (s * x + c * y)
        wide = np.abs(c) * reach_x + np.abs(s) * reach_y
        tall = np.abs(s) * reach_x + np.abs(c) * reach_y
        window = self.canvas.window(world_x, world_y, scale * wide, scale * tall)
        moved = window.moved(self.pose.head_x, self.pose.head_y, self.pose.tilt)
        return Window(window.rows, window.cols, moved.x / scale, moved.y / scale, self.px)

    def place(self, x, y, lift=1.0):
        """Where the head's plane shows a point of the face, `lift` times as far out as the surface."""
        a, b = self.identity.face_width, self.identity.face_height
        z = np.sqrt(np.maximum(1 - (x / a) ** 2 - (y / b) ** 2, 0))
        return self.turn(lift * x / a, lift * y / b, lift * z)

    def turn(self, x, y, z):
        """Where the head's plane shows a point given in units of the ball's radii."""
        across, depth = x * self.cos_yaw + z * self.sin_yaw, z * self.cos_yaw - x * self.sin_yaw
        return across * self.identity.face_width, (
            y * self.cos_pitch + depth * self.sin_pitch
        ) * self.identity.face_height

    def ball(self, window: Window, swell: float = 1.0, rise: float = 0.0) -> Surface:
        """The surface of the ball, or of one `swell` times as large and `rise` higher, that a window shows."""
        a, b, jaw = self.identity.face_width, self.identity.face_height, self.identity.jaw
        y = (window.y + rise) * np.float32(1 / (b * swell))
        below = np.maximum(y, 0)
        if swell == 1.0:
            y = y / (1 + np.float32(0.07) * self.pose.mouth_open * below)  # the chin drops with the jaw
        x = window.x * np.float32(1 / (a * swell)) / (1 - jaw * below * below)
        r2 = x * x + y * y
        cover = np.clip((1 - r2) * (np.float32(0.25 * (a + b)) * swell * self.px) + 0.5, 0, 1)
        z = np.sqrt(np.maximum(1 - r2, 0))
        back = y * self.sin_pitch
        y, z = y * self.cos_pitch - z * self.sin_pitch, back + z * self.cos_pitch
        x, z = x * self.cos_yaw - z * self.sin_yaw, x * self.sin_yaw + z * self.cos_yaw
        return Surface(window.rows, window.cols, x * np.float32(a), y * np.float32(b), self.px, z, cover)

    def feature(self, x, y, reach_x, reach_y=None) -> Surface:
        """The part of the face within reach of a point of it, in coordinates from that point."""
        near = self.window(*self.place(x, y), reach_x, reach_y)
        full = self.front
        rows = _within(near.rows, full.rows)
        cols = _within(near.cols, full.cols)
        cut = (slice(None), _shift(rows, full.rows), _shift(cols, full.cols))
        return Surface(rows, cols, full.x[cut] - x, full.y[cut] - y, self.px, full.z[cut], full.cover[cut])


def _within(part: slice, whole: slice) -> slice:
    start = min(max(part.start, whole.start), whole.stop)
    return slice(start, max(start, min(part.stop, whole.stop)))


def _shift(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)
