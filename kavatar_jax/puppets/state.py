"""What a puppet does at each frame: the named columns of a state array, and the geometry that follows from them.

A state is (F, K) float32, its columns named by COLUMNS. Angles are degrees, lengths world units (half the shorter side
of the frame). Left and right are the viewer's.
"""

import numpy as np

RANGES = {
    "mouth_open": (0, 1),  # gap between the lips
    "mouth_width": (-1, 1),  # rounded .. spread
    "teeth": (0, 1),
    "smile": (-1, 1),  # frown .. smile: corners of the mouth, cheeks
    "brow_raise": (-1, 1),
    "brow_tilt": (-1, 1),  # angry .. sad
    "blink": (0, 1),  # open .. shut
    "gaze_x": (-1, 1),  # left .. right
    "gaze_y": (-1, 1),  # up .. down
    "yaw": (-30, 30),  # towards the left .. right
    "pitch": (-18, 18),  # up .. down
    "roll": (-15, 15),  # head tilts left .. right
    "sway_x": (-0.12, 0.12),  # the whole body
    "sway_y": (-0.08, 0.08),
    "lean": (-1, 1),  # away .. towards the camera
    "breath": (0, 1),
    "hand": (0, 1),  # out of sight .. raised beside the head
    "hand_side": (-1, 1),  # -1 at the left, 1 at the right
    "wave": (-1, 1),  # tilt of the raised hand
    "zoom": (0.85, 1.35),
    "pan_x": (-0.25, 0.25),
    "pan_y": (-0.15, 0.15),
    "light": (-1, 1),  # dim .. bright
    "light_x": (-1, 1),  # from the left .. right
}
COLUMNS = tuple(RANGES)
MOUTH = ("mouth_open", "mouth_width", "teeth")  # what speech moves
_REST = {"zoom": 1.0, "hand_side": 1.0, "breath": 0.3}

NECK = 0.56  # height of the joint about which the head tilts
HEAD = 0.64  # from there to the middle of the face


def rest_state(frames: int) -> np.ndarray:
    """(frames, K): looking straight ahead, mouth closed, neutral."""
    return np.tile(np.float32([_REST.get(name, 0.0) for name in COLUMNS]), (frames, 1))


def column(state: np.ndarray, name: str) -> np.ndarray:
    """(F,) view of one named column; writing to it changes the state."""
    return state[:, COLUMNS.index(name)]


class Pose:
    """A state as (F, 1, 1) columns (`pose.yaw`), with the place of the head in the world.

    head_x, head_y: middle of the face; head_scale: its size; tilt: roll in radians.
    """

    def __init__(self, state: np.ndarray):
        for name, values in zip(COLUMNS, state.T, strict=True):
            setattr(self, name, np.asarray(values, np.float32)[:, None, None])
        self.tilt = np.radians(self.roll)
        self.head_scale = 1 + np.float32(0.1) * self.lean
        self.neck_x = self.sway_x
        self.neck_y = NECK + self.sway_y - np.float32(0.012) * self.breath
        self.head_x = self.neck_x + HEAD * self.head_scale * np.sin(self.tilt)
        self.head_y = self.neck_y - HEAD * self.head_scale * np.cos(self.tilt)

    # the columns are set by name above; this tells readers and type checkers that they are arrays
    def __getattr__(self, name: str) -> np.ndarray:
        raise AttributeError(f"a pose has no {name!r}; its columns are {', '.join(COLUMNS)}")
