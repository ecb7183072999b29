"""Faces in a picture: (H, W, 3) uint8 in, `Face`s with landmarks, mouth and eye openings and masks out.

Optional: needs mediapipe (`pip install kavatar-jax[faces]`) and its face landmark model with blendshapes (Apache-2.0,
3.8 MB), downloaded once by the user from

    https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/latest/face_landmarker.task

to ~/.cache/kavatar_jax/face_landmarker.task, or to a place that KAVATAR_FACE_MODEL names. Nothing is downloaded here.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

MODEL_URL = "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/latest/face_landmarker.task"
BLENDSHAPES = ("jawOpen", "mouthClose", "eyeBlinkLeft", "eyeBlinkRight")

# Face-mesh indices of the outer lip, corner to corner, as StableAvatar's lip_mask_extractor.py draws them.
_UPPER_LIP = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291)
_LOWER_LIP = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291)


@dataclass(frozen=True, kw_only=True)
class Face:
    """One face, in pixels of the picture it was found in (x to the right, y down; parts outside the picture stay).

    box: left, top, right, bottom of the landmarks
    landmarks: (478, 2) float32, MediaPipe's face mesh with irises
    blendshapes: BLENDSHAPES -> 0 (relaxed) to 1 (jaw wide open, eye shut)
    """

    box: tuple[float, float, float, float]
    landmarks: np.ndarray = field(repr=False)
    blendshapes: dict[str, float]

    @property
    def lips(self) -> tuple[np.ndarray, np.ndarray]:
        """Polygons of the upper and of the lower outer lip, each (11, 2) in pixels; together they cover the mouth."""
        return self.landmarks[list(_UPPER_LIP)], self.landmarks[list(_LOWER_LIP)]


def open_landmarker(model_path: str | Path | None = None, *, max_faces: int = 10) -> tuple[Any | None, str]:
    """(landmarker, "") or, where faces cannot be looked for, (None, why and what to do).

    The model is model_path, else $KAVATAR_FACE_MODEL, else ~/.cache/kavatar_jax/face_landmarker.task. The landmarker is
    mediapipe's own object for still pictures: use it in a `with` block or close() it. Takes about two seconds.
    """
    path = Path(
        model_path or os.environ.get("KAVATAR_FACE_MODEL") or "~/.cache/kavatar_jax/face_landmarker.task"
    ).expanduser()
    if importlib.util.find_spec("mediapipe") is None:
        return None, "mediapipe is not installed; pip install 'kavatar-jax[faces]'"
    if not path.is_file():
        return None, f"face model {path}: no such file; download {MODEL_URL} to it, or set KAVATAR_FACE_MODEL"
    try:
        with _native_log_silenced():
            return _create_landmarker(path, max_faces), ""
    except (RuntimeError, ValueError) as error:
        return None, f"face model {path}: mediapipe cannot load it ({str(error).splitlines()[0]})"


def find_faces(landmarker: Any, image: np.ndarray) -> list[Face]:
    """Faces in an (H, W, 3) uint8 RGB picture, largest first. Takes 20 to 30 ms; misses faces narrower than a tenth
    of the picture, animals and some profiles."""
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8, (image.shape, image.dtype)
    import mediapipe

    found = landmarker.detect(
        mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(image))
    )
    height, width = image.shape[:2]
    faces = []
    for mesh, shapes in zip(found.face_landmarks, found.face_blendshapes, strict=True):
        landmarks = np.array([(point.x * width, point.y * height) for point in mesh], np.float32)
        left, top = landmarks.min(axis=0).tolist()
        right, bottom = landmarks.max(axis=0).tolist()
        scores = {shape.category_name: shape.score for shape in shapes}
        scores = {name: float(scores[name]) for name in BLENDSHAPES}
        faces.append(Face(box=(left, top, right, bottom), landmarks=landmarks, blendshapes=scores))
    return sorted(faces, key=lambda face: (face.box[0] - face.box[2]) * (face.box[3] - face.box[1]))


def lip_mask(face: Face, size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool, true inside the outer lips and, when the mouth is open, between them. size: (h, w) of the picture.

    StableAvatar's lip masks are the union over the faces of a frame, and all false where there is no face.
    """
    canvas = Image.new("1", (size[1], size[0]))
    for polygon in face.lips:
        ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for x, y in polygon], fill=1)
    return np.asarray(canvas, dtype=bool)


def face_mask(face: Face, size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool, true inside the face's box. size: (h, w) of the picture.

    StableAvatar's face masks are filled boxes too: the union over the faces, and all true where there is no face.
    """
    mask = np.zeros(size, bool)
    left, top, right, bottom = np.maximum(face.box, 0)
    mask[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = True
    return mask


def _create_landmarker(path: Path, max_faces: int) -> Any:
    import mediapipe
    from mediapipe.tasks.python import BaseOptions, vision

    options = vision.FaceLandmarkerOptions(
        base_options=BaseOptions(model_asset_path=str(path)), output_face_blendshapes=True, num_faces=max_faces
    )
    landmarker = vision.FaceLandmarker.create_from_options(options)
    blank = np.zeros((64, 64, 3), np.uint8)  # one empty run, so that all that is logged once is logged now
    landmarker.detect(mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=blank))
    return landmarker


@contextlib.contextmanager
def _native_log_silenced() -> Iterator[None]:
    """Send file descriptor 2 nowhere: mediapipe's C++ log goes straight there and obeys no environment variable."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
