"""Pictures to numpy: any portrait in, (H, W, 3) uint8 fitted to the video out; and torch's bicubic resize.

Fitting never squashes: the picture is scaled until it covers the frame, and the crop follows the face.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from kavatar_jax.media import faces

MULTIPLE = 16  # VAE stride 8 times patch size 2 (Wan2.1)
MAX_PIXELS = 100_000_000  # above this a file is refused before it is decoded: it would take gigabytes

_BACKDROP = (128, 128, 128)  # behind transparency: zero in the models' [-1, 1]


def load_portrait(path: str | Path, *, size: tuple[int, int], face_model: str | Path | None = None) -> np.ndarray:
    """The picture as (H, W, 3) uint8 RGB, where size = (W, H) in pixels, both multiples of 16.

    Whatever Pillow reads: EXIF rotation and colour profile applied, transparency laid on mid grey, 16-bit scaled, the
    first frame of an animation. Cropped around the faces if mediapipe and its model are at hand (face_model: see
    faces.open_landmarker), otherwise, or where no face is found, by upper centre.

    Errors: ValueError for a size that is no multiple of 16 and a file that is missing, empty, broken or enormous.
    """
    check_size(*size)
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"portrait {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise ValueError(f"portrait {path}: the file is empty (0 bytes)")
    picture = _open(path)
    return fit(picture, size=size, boxes=_face_boxes(picture, face_model))


def fit(
    picture: Image.Image, *, size: tuple[int, int], boxes: list[tuple[float, float, float, float]] | None = None
) -> np.ndarray:
    """Cover the frame with the picture and crop what is over: (H, W, 3) uint8, size = (W, H), Lanczos, antialiased.

    boxes: faces as (left, top, right, bottom) in the picture's pixels, largest first. The middle of all of them, or
    of the largest if not all fit, goes to the centre of the frame and two fifths from its top, as far as there is
    picture. Without a box a quarter of what is over is cut from the top and three from the bottom, half from each side.
    """
    width, height = picture.size
    scale = min(width / size[0], height / size[1])
    crop_w, crop_h = size[0] * scale, size[1] * scale
    left, top = (width - crop_w) / 2, (height - crop_h) / 4
    if boxes:
        x0, y0, x1, y1 = _union(boxes) if _fits(_union(boxes), crop_w, crop_h) else boxes[0]
        left, top = (x0 + x1 - crop_w) / 2, (y0 + y1) / 2 - 0.4 * crop_h
    left, top = max(min(left, width - crop_w), 0.0), max(min(top, height - crop_h), 0.0)
    window = (left, top, min(left + crop_w, width), min(top + crop_h, height))
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS, box=window))


def fit_size(width: int, height: int, multiple: int = MULTIPLE) -> tuple[int, int]:
    """The nearest (width, height) that are multiples of 16 or another number, at least once; halfway goes up."""
    return _nearest_multiple(width, multiple), _nearest_multiple(height, multiple)


def check_size(width: int, height: int, multiple: int = MULTIPLE) -> None:
    """ValueError that names the nearest good size, unless both sides are positive multiples."""
    nearest = fit_size(width, height, multiple)
    if (width, height) != nearest:
        raise ValueError(
            f"size {width}x{height} is not a multiple of {multiple}; the nearest is {nearest[0]}x{nearest[1]}"
        )


def resize_bicubic_torch(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(..., H, W, C) float32 -> (..., height, width, C): torch's F.interpolate(mode="bicubic", align_corners=False).

    That is a = -0.75, half-pixel centres, no antialias, edges repeated. Wan2.1 and its CLIP preprocess with it; Pillow
    and jax.image.resize take a = -0.5 and antialias, which is not the same picture.
    """
    assert image.dtype == np.float32 and image.ndim >= 3, (image.dtype, image.shape)
    *lead, rows, columns, channels = image.shape
    image = _bicubic_matrix(rows, height) @ image.reshape(*lead, rows, columns * channels)
    return _bicubic_matrix(columns, width) @ image.reshape(*lead, height, columns, channels)


def _nearest_multiple(side: int, multiple: int) -> int:
    return max(multiple, (side + multiple // 2) // multiple * multiple)


def _open(path: Path) -> Image.Image:
    """Decoded, upright, RGB."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            opened = Image.open(path)
        with opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{opened.width}x{opened.height} pixels")
            return _to_rgb(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"portrait {path}: too large to open ({error}); scale it to under {MAX_PIXELS // 10**6} megapixels"
        ) from error
    except (OSError, SyntaxError, EOFError, ValueError) as error:  # what Pillow's readers raise for broken files
        raise ValueError(
            f"portrait {path}: not a picture that Pillow can read ({error}); save it as PNG or JPEG"
        ) from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":  # Pillow would clip these at 255
        values = np.asarray(picture, dtype=np.float32)
        top = 255.0 if values.max() > 1 else 1.0
        top = 65535.0 if picture.mode.startswith("I;16") or values.max() > 255 else top
        return Image.fromarray(np.round(np.clip(values / top, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    clear = picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info
    picture = _to_srgb(picture)
    if not clear:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, _BACKDROP), layer).convert("RGB")


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Apply the embedded colour profile; a profile that is broken or does not fit the mode is ignored."""
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return picture
    mode = "RGBA" if picture.mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError):
        return picture
    return converted or picture


def _face_boxes(picture: Image.Image, face_model: str | Path | None) -> list[tuple[float, float, float, float]]:
    landmarker, _ = faces.open_landmarker(face_model)
    if landmarker is None:
        return []
    with landmarker:
        return [face.box for face in faces.find_faces(landmarker, np.asarray(picture))]


def _union(boxes: list[tuple[float, float, float, float]]) -> tuple[float, float, float, float]:
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _fits(box: tuple[float, float, float, float], width: float, height: float) -> bool:
    return box[2] - box[0] <= width and box[3] - box[1] <= height


def _bicubic_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float32 weights, with coordinates as coarse as torch's: exact ones would be 1e-4 off."""
    a, one = np.float32(-0.75), np.float32(1)
    scale = float(np.float32(source) / np.float32(target))
    position = np.float32(scale * (np.arange(target) + 0.5) - 0.5)  # one rounding: torch's kernel fuses the two steps
    first = np.floor(position)
    t = position - first
    near = [((a + 2) * d - (a + 3)) * d * d + one for d in (t, one - t)]
    far = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in (t + one, one - t + one)]
    matrix = np.zeros((target, source), np.float32)
    for tap, weight in zip((-1, 0, 1, 2), (far[0], *near, far[1]), strict=True):
        column = np.clip(first.astype(int) + tap, 0, source - 1)
        np.add.at(matrix, (np.arange(target), column), weight)  # taps beyond an edge land on the edge, and add up
    return matrix


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> size (width, height), antialiased; the very array if it has that size."""
    if image.shape[1::-1] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
