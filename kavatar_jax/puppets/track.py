"""Where camera and head are in each frame, from pixels alone: frames and a portrait go in, two tracks come out.

The camera is followed on the far wall beside the puppet, the head on a ball that carries the portrait's face, with its
outline, which moves with the head but does not turn. The ball has the shape of an average face.
"""

from dataclasses import dataclass

import numpy as np

from kavatar_jax.puppets import align
from kavatar_jax.puppets.backdrop import DISTANT
from kavatar_jax.puppets.state import HEAD, NECK

WIDE, TALL = 0.48, 0.585  # half an average face
_REST = np.array((0.0, 0.0, 0.0, 0.0, 0.0, NECK - HEAD))  # of the head in a portrait
_CAMERA_SPRING = 1 / np.array((0.03, 0.03, 0.015)) ** 2  # how far zoom and pan usually go within a frame
_HEAD_SPRING = 1 / np.array((6.0, 4.0, 4.0, 0.05, 0.05, 0.05)) ** 2


@dataclass(frozen=True)
class Tracks:
    """camera: (F, 3) zoom, pan_x, pan_y; head: (F, 6) yaw, pitch, roll in degrees, log of its size against the
    portrait's, and the place of its middle in half shorter sides of the frame; camera_spread: (F,) standard deviation of
    the zoom, large where the wall shows nothing to follow."""

    camera: np.ndarray
    head: np.ndarray
    camera_spread: np.ndarray


def track(frames: np.ndarray, portrait: np.ndarray) -> Tracks:
    """frames: (F, H, W, 3) float32 in [0, 1]; portrait: (H, W, 3) likewise, a puppet at rest."""
    size = portrait.shape[:2]
    wall, ball, rim = _points(size)
    layers = align.pyramid(portrait)
    camera = align.Follower(layers, _camera_warp(wall, size), np.array((1.0, 0.0, 0.0)), spring=_CAMERA_SPRING)
    head = align.Follower(layers, head_warp(ball, size, rim), _REST, spring=_HEAD_SPRING)
    cameras, heads, spreads = [], [], []
    for frame in frames:
        layers = align.pyramid(frame)
        params, certainty = camera.update(layers)
        cameras.append(params)
        spreads.append(1 / np.sqrt(max(certainty[0], 1e-6)))
        heads.append(head.update(layers)[0])
    return Tracks(np.array(cameras), np.array(heads), np.array(spreads))


def at_rest(frames: int) -> np.ndarray:
    """(frames, 6): the head as it is in a portrait."""
    return np.tile(_REST, (frames, 1))


def head_warp(points: np.ndarray, size: tuple[int, int], rim: np.ndarray | None = None) -> align.Warp:
    """Where a turning head shows points (2, N) of the plane of the unturned face; rim: (N,) those of its outline."""
    unit, middle = min(size) / 2, np.array([[size[1] / 2], [size[0] / 2]])
    rim = np.zeros(points.shape[1], bool) if rim is None else rim
    x, y = points[0] / WIDE, points[1] / TALL
    nose = points[0] ** 2 + (points[1] - 0.125) ** 2 < 0.075**2
    lift = np.where(nose, 1.22, 1.0)
    z = lift * np.sqrt(np.maximum(1 - (x / lift) ** 2 - (y / lift) ** 2, 0)) * ~rim

    def warp(params):
        yaw, pitch, roll = np.radians(params[:3])
        scale = np.exp(params[3])
        across = np.where(rim, x, x * np.cos(yaw) + z * np.sin(yaw))
        depth = z * np.cos(yaw) - x * np.sin(yaw)
        down = np.where(rim, y, y * np.cos(pitch) + depth * np.sin(pitch))
        c, s = scale * np.cos(roll), scale * np.sin(roll)

        def turned(u, v):
            return np.stack([c * WIDE * u - s * TALL * v, s * WIDE * u + c * TALL * v])

        place = turned(across, down)
        none = np.zeros_like(x)
        by_yaw = turned(np.where(rim, 0, depth), np.where(rim, 0, -np.sin(pitch) * across))
        by_pitch = turned(none, np.where(rim, 0, depth * np.cos(pitch) - y * np.sin(pitch)))
        by_roll = np.stack([-place[1], place[0]])
        degree = np.pi / 180
        moves = [degree * by_yaw, degree * by_pitch, degree * by_roll, place]
        moves += [np.stack([none + 1, none]), np.stack([none, none + 1])]
        return middle + unit * (place + params[4:, None]), unit * np.stack(moves)

    return warp


def through_camera(points: np.ndarray, camera, size: tuple[int, ...], distance: float = 1.0) -> np.ndarray:
    """(2, N) pixels at which a camera of (zoom, pan_x, pan_y) shows points (2, N) of the world.

    distance: how much of the camera's moves they follow, 1 for the puppet, DISTANT for the far wall.
    """
    zoom, *pan = camera
    middle = np.array([[size[1] / 2], [size[0] / 2]])
    return middle + min(size[:2]) / 2 * (1 + distance * (zoom - 1)) * (points - distance * np.reshape(pan, (2, 1)))


def _camera_warp(points: np.ndarray, size: tuple[int, int]) -> align.Warp:
    """How a camera of (zoom, pan_x, pan_y) moves points (2, N) of the far wall."""
    unit = min(size) / 2

    def warp(params):
        shift = np.full(points.shape[1], -DISTANT * (1 + DISTANT * (params[0] - 1)))
        none = np.zeros_like(shift)
        by_zoom = DISTANT * (points - DISTANT * params[1:, None])
        moves = np.stack([by_zoom, np.stack([shift, none]), np.stack([none, shift])])
        return through_camera(points, params, size, DISTANT), unit * moves

    return warp


def _points(size: tuple[int, int]):
    """Points of the wall, and of the head with its outline, in a portrait: (2, N), (2, M), and (M,) the outline's."""
    half_height, half_width = (side / min(size) for side in size)
    x, y = _grid(half_width, half_height, 0.05)
    wall = ((np.abs(x) > 0.68) & (y < 0.35)) | (y < -0.9)
    face_x, face_y = _grid(0.62, 0.75, 0.032)
    reach = np.hypot(face_x / WIDE, face_y / TALL)
    mouth = (np.abs(face_x) < 0.27) & (face_y > 0.15)
    rim = (reach > 0.9) & (reach < 1.22) & ~((face_y > 0.3) & (np.abs(face_x) < 0.25))
    head = rim | ((reach < 0.72) & ~mouth)
    return np.stack([x[wall], y[wall]]), np.stack([face_x[head], face_y[head]]), rim[head]


def _grid(half_width: float, half_height: float, step: float):
    x, y = np.meshgrid(np.arange(-half_width, half_width, step), np.arange(-half_height, half_height, step))
    return x.ravel() + step / 2, y.ravel() + step / 2
