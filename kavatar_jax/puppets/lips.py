"""What a mouth does, from pixels alone: pictures of the mouth of a head held still go in, its shape comes out.

Analysis by synthesis: the stage's own mouth is drawn in many shapes onto the portrait's face, the nearest three are
refined by Gauss-Newton, and the best is kept. The lips' size and colour are first fitted to the portrait, in which they
are shut, and the sharpness of the drawing to that of the frames.
"""

from dataclasses import replace
from itertools import product

import numpy as np
from scipy import ndimage

from kavatar_jax.puppets.face import GAP, JAW, MOUTH_Y, paint_mouth
from kavatar_jax.puppets.head import Surface
from kavatar_jax.puppets.identity import Identity, sample_identity
from kavatar_jax.puppets.shapes import Canvas
from kavatar_jax.puppets.state import COLUMNS, Pose, column, rest_state
from kavatar_jax.puppets.track import TALL

SHAPE = ("mouth_open", "mouth_width", "smile", "teeth")
_STEP = 0.017  # of the pictures' grid, in world units: about a pixel of a frame of 128
_X = np.arange(-0.3, 0.3, _STEP, dtype=np.float32)
_Y = np.arange(0.1, 0.66, _STEP, dtype=np.float32)
_OPENINGS = (0.0, 0.06, 0.12, 0.2, 0.3, 0.42, 0.6, 0.85)
_ZONES = (0.13, 0.35)  # openings that part the bank into three
_BANK = np.array(list(product(_OPENINGS, (-0.9, -0.3, 0.3, 0.9), (-0.8, 0.0, 0.8), (0.0, 0.7))))
_BLURS = (0.9, 1.7, 2.6)  # pictures' pixels
_NUDGE = np.array((0.02, 0.05, 0.05, 0.1))
_SPRING = np.diag((4.0, 4.0, 4.0, 20.0))  # against wandering where nothing is seen, as of teeth behind shut lips
_LOW, _HIGH = (0.0, -1.2, -1.2, 0.0), (1.05, 1.2, 1.2, 1.0)


def grid() -> np.ndarray:
    """(2, N): where on the plane of the face the pictures' points lie; a picture is these points, in order."""
    return np.stack([axis.ravel() for axis in np.meshgrid(_X, _Y)])


def read_lips(pictures: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """(F, 4) shapes, columns as in SHAPE.

    pictures: (F, N, 3) colours at the points of `grid`, in [0, 1]; rest: (N, 3) the same with the mouth shut.
    """
    pictures = pictures.reshape(-1, len(_Y), len(_X), 3).astype(np.float32)
    skin, lips = _fit_lips(rest.reshape(len(_Y), len(_X), 3).astype(np.float32))
    bank = _draw(skin, lips, _BANK)
    drawn = np.abs(bank - skin).max((0, 3)) > 0.03
    edge = ~drawn & (_Y[:, None] < 0.5)
    exposure = np.median(skin[edge], 0) / (np.median(pictures[:, edge], 1) + 1e-3)
    pictures = pictures * np.clip(exposure, 0.5, 2)[:, None, None]
    blur = _sharpness(pictures, bank, drawn)
    seen = _blurred(pictures, blur[0])[:, drawn]
    known = _blurred(bank, blur[1])[:, drawn]
    error = _distances(seen, known)
    best, least = np.zeros((len(seen), 4)), np.full(len(seen), np.inf)
    zone = np.digitize(_BANK[:, 0], _ZONES)
    for i in range(len(_ZONES) + 1):
        nearest = np.where(zone == i, error, np.inf)
        worth = np.flatnonzero(nearest.min(1) < 3 * error.min(1) + 1e-4)
        if len(worth) == 0:
            continue
        start = _BANK[nearest[worth].argmin(1)]
        shapes, errors = _refine(seen[worth], start, lambda at: _blurred(_draw(skin, lips, at), blur[1])[:, drawn])
        better = errors < least[worth]
        best[worth[better]], least[worth[better]] = shapes[better], errors[better]
    return best


def _fit_lips(rest: np.ndarray) -> tuple[np.ndarray, Identity]:
    """The face without its mouth, and a look whose closed lips fit the picture; its other traits mean nothing."""
    look = sample_identity(0)
    shut = np.zeros((1, len(SHAPE)))
    seen = _blurred(rest[None], _BLURS[0])[0]
    usual = _draw(np.zeros_like(rest), replace(look, mouth_width=0.155, lip_fullness=0.026), shut)[0]
    mouth = ndimage.binary_dilation(usual.max(-1) > 0.03)
    skin, cover = rest, rest
    for _ in range(2):
        skin, least = _without(rest, mouth), np.inf
        for width, full in product(np.arange(0.138, 0.19, 0.008), np.arange(0.018, 0.045, 0.004)):
            guess = replace(look, mouth_width=float(width), lip_fullness=float(full), lip=(0.0, 0.0, 0.0))
            black = _blurred(_draw(skin, guess, shut), _BLURS[0])[0]
            white = _blurred(_draw(skin, replace(guess, lip=(255.0, 255.0, 255.0)), shut), _BLURS[0])[0]
            weight, wanted = white - black, seen - black
            lip = (weight * wanted).sum((0, 1)) / (weight * weight).sum((0, 1))
            error = np.sum((wanted - weight * lip) ** 2)
            if error < least:
                least, cover = error, weight[..., 0]
                look = replace(guess, lip=tuple(255 * np.clip(lip, 0, 1)))
        mouth = ndimage.binary_dilation(cover > 0.03)
    return skin, look


def _without(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The picture with a hole filled in with the skin around it; beard and moustache leave a rim of skin about the lips."""
    skin = np.median(picture[(np.abs(_X)[None] > 0.2) & (_Y[:, None] < 0.2)], 0)
    like = np.exp(-np.sum((picture - skin) ** 2, -1, keepdims=True) / 0.1**2)
    known = like.astype(np.float64) * ~hole[..., None]
    spread = (2, 2, 0)
    filled = ndimage.gaussian_filter(picture * known, spread) / (ndimage.gaussian_filter(known, spread) + 1e-9)
    return np.where(hole[..., None], filled, picture).astype(np.float32)


def _draw(skin: np.ndarray, look: Identity, shapes: np.ndarray) -> np.ndarray:
    """(K, h, w, 3): the stage's mouth in K shapes on a face."""
    state = rest_state(len(shapes))
    for name, values in zip(SHAPE, shapes.T, strict=True):
        column(state, name)[:] = values
    pose = Pose(state)
    one = np.ones((len(shapes), 1, 1), np.float32)
    rgb = 255 * np.moveaxis(_lowered(skin, pose.mouth_open), -1, 0)
    y = _Y[None, :, None] / (1 + 0.07 * pose.mouth_open * _Y[None, :, None] / TALL) - MOUTH_Y  # the jaw drops
    canvas = Canvas(rgb, one, 0 * one, 0 * one)
    part = Surface(slice(None), slice(None), one * _X, y + 0 * one, one / _STEP, one, one)
    paint_mouth(canvas, part, look, pose)
    return canvas.rgb.transpose(1, 2, 3, 0) / 255


def _lowered(skin: np.ndarray, opening: np.ndarray) -> np.ndarray:
    """(K, h, w, 3): the face as jaws open by (K, 1, 1) carry what grows below the lips down with them."""
    fade = np.clip((0.58 - _Y) / 0.08, 0, 1)[:, None]
    drop = JAW * GAP * opening * np.maximum(1 - (_X / 0.25) ** 2, 0) * fade * (_Y > MOUTH_Y)[:, None]
    at = np.clip(np.arange(len(_Y))[:, None] - drop / _STEP, 0, len(_Y) - 1.001)
    low = at.astype(np.int64)
    part = (at - low)[..., None].astype(np.float32)
    columns = np.arange(len(_X))
    return skin[low, columns] * (1 - part) + skin[low + 1, columns] * part


def _blurred(pictures: np.ndarray, blur: float) -> np.ndarray:
    return ndimage.gaussian_filter(pictures, (0, blur, blur, 0), truncate=2.5) if blur else pictures


def _sharpness(pictures: np.ndarray, bank: np.ndarray, drawn: np.ndarray) -> tuple[float, float]:
    """Blurs for the pictures and for the drawings that make them most alike, on a few of the pictures."""
    few = pictures[:: max(1, len(pictures) // 12)]
    seen = _blurred(few, _BLURS[0])[:, drawn]
    errors = [_distances(seen, _blurred(bank, blur)[:, drawn]).min(1).sum() for blur in _BLURS]
    return _BLURS[0], _BLURS[int(np.argmin(errors))]


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(F, K) mean squared differences of F pictures and K others."""
    one, other = one.reshape(len(one), -1), other.reshape(len(other), -1)
    return ((one**2).sum(1)[:, None] - 2 * one @ other.T + (other**2).sum(1)) / one.shape[1]


def _refine(seen: np.ndarray, start: np.ndarray, draw) -> tuple[np.ndarray, np.ndarray]:
    """Shapes (F, 4) near `start` whose drawings are nearest to the pictures, and how far off they still are (F,)."""
    shapes, count = start.astype(np.float64), len(seen)
    seen = seen.reshape(count, -1)
    for _ in range(4):
        nudges = np.where(shapes + _NUDGE > _HIGH, -_NUDGE, _NUDGE)
        tries = np.concatenate([shapes] + [shapes + nudges * np.eye(4)[k] for k in range(4)])
        drawings = draw(tries).reshape(5, count, -1)
        error = seen - drawings[0]
        slopes = (drawings[1:] - drawings[0]) / nudges.T[..., None]
        noise = (error**2).mean(1) + 1e-4
        information = np.einsum("kfn,lfn->fkl", slopes, slopes) / noise[:, None, None] + _SPRING
        pull = np.einsum("kfn,fn->fk", slopes, error) / noise[:, None]
        change = np.linalg.solve(information, pull[..., None])[..., 0]
        shapes = np.clip(shapes + np.clip(change, -0.25, 0.25), _LOW, _HIGH)
    error = seen - draw(shapes).reshape(count, -1)
    return shapes, (error**2).mean(1)


assert set(SHAPE) <= set(COLUMNS)
