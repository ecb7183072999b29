"""The renderer: an identity and a state for every frame go in, a video and its face and lip masks come out.

Shapes are painted with analytic coverage, in float32, several frames at a time; a frame depends on its own row of the
state and on nothing else. 128x128 takes about 1.5 ms a frame on one core of a server, 256x256 about 8.
"""

from dataclasses import dataclass

import numpy as np

from kavatar_jax.puppets.backdrop import paint_backdrop, view_backdrop
from kavatar_jax.puppets.face import paint_ears, paint_face, paint_glasses
from kavatar_jax.puppets.figure import paint_body, paint_hand
from kavatar_jax.puppets.hair import paint_back_hair, paint_hair
from kavatar_jax.puppets.head import Head
from kavatar_jax.puppets.identity import Identity
from kavatar_jax.puppets.shapes import Canvas
from kavatar_jax.puppets.state import COLUMNS, Pose, column, rest_state

_STACK = 8  # frames painted together: enough to hide numpy's call overhead, few enough to stay in cache


@dataclass(frozen=True)
class Footage:
    """video: (F, H, W, 3) uint8; face_mask, lip_mask: (F, H, W) bool, the skin of the head and the lips with all
    that is between them (a raised hand never covers either)."""

    video: np.ndarray
    face_mask: np.ndarray
    lip_mask: np.ndarray


def render(identity: Identity, state: np.ndarray, *, height: int = 128, width: int = 128) -> Footage:
    """Film a puppet. state: (F, K), columns as in `state.COLUMNS`."""
    if state.ndim != 2 or state.shape[1] != len(COLUMNS):
        raise ValueError(f"state has shape {state.shape}; it must be (frames, {len(COLUMNS)}), columns as in COLUMNS")
    if min(height, width) < 16:
        raise ValueError(f"a frame of {height}x{width} is too small to draw; use at least 16x16")
    frames = len(state)
    backdrop = paint_backdrop(identity, height, width)
    video = np.empty((frames, height, width, 3), np.uint8)
    face, lips = np.empty((2, frames, height, width), bool)
    for start in range(0, frames, _STACK):
        part = slice(start, start + _STACK)
        video[part], face[part], lips[part] = _shoot(identity, state[part], backdrop, height, width)
    return Footage(video, face, lips)


def render_portrait(identity: Identity, *, height: int = 128, width: int = 128) -> np.ndarray:
    """(H, W, 3) uint8: the identity at rest, facing the camera with a closed mouth."""
    return render(identity, rest_state(1), height=height, width=width).video[0]


def _shoot(identity: Identity, state: np.ndarray, backdrop: np.ndarray, height: int, width: int):
    camera = [column(state, name).astype(np.float64) for name in ("zoom", "pan_x", "pan_y")]
    pose = Pose(state)
    rgb = view_backdrop(backdrop, *camera, height=height, width=width)
    canvas = Canvas(rgb, pose.zoom, pose.pan_x, pose.pan_y)
    head = Head(canvas, identity, pose)
    paint_back_hair(head)
    paint_body(canvas, identity, pose)
    paint_ears(head)
    face, lips = paint_face(head)
    if identity.glasses != "none":
        paint_glasses(head)
    hair, cover = paint_hair(head)
    face[:, hair.rows, hair.cols] *= 1 - cover
    paint_hand(canvas, identity, pose)
    exposure = 1 + np.float32(0.12) * pose.light
    pixels = np.clip(canvas.rgb * exposure + np.float32(0.5), 0, 255).astype(np.uint8)
    return pixels.transpose(1, 2, 3, 0), face > 0.5, lips > 0.5
