"""The place behind a puppet: an identity goes in, a textured picture larger than any frame comes out, and its view.

The picture covers REACH world units to each side, so that panning and zooming out never meet its edge.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from kavatar_jax.puppets.identity import CLOTHES, Identity

REACH = 1.6
DISTANT = 0.7  # how much of the camera's pan and zoom the far wall follows


@lru_cache(maxsize=4)  # a clip and its portrait share one
def paint_backdrop(identity: Identity, height: int, width: int) -> Image.Image:
    """The place at the resolution of a (height, width) frame."""
    rng = np.random.default_rng([identity.seed, 0xBD])
    unit = min(height, width) / 2
    size = (round(REACH * width), round(REACH * height))
    image = Image.new("RGB", (2 * size[0], 2 * size[1]), _rgb(identity.wall))
    _PAINTERS[identity.place](_Brush(image, 2 * unit), rng, np.asarray(identity.wall))
    image = image.resize(size, Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(0.02 * unit))
    lit = np.asarray(image, np.float32) * _lighting(rng, size)[..., None]
    return Image.fromarray(np.clip(lit + 0.5, 0, 255).astype(np.uint8))


def view_backdrop(picture: Image.Image, zoom, pan_x, pan_y, *, height: int, width: int) -> np.ndarray:
    """(3, F, height, width) float32, 0..255: the picture through a camera, bilinear. zoom, pan_x, pan_y: (F,)."""
    scale = 1 / (1 + DISTANT * (zoom - 1))
    unit = min(height, width) / 2
    middle_x = picture.width / 2 + DISTANT * unit * pan_x
    middle_y = picture.height / 2 + DISTANT * unit * pan_y
    reach_x, reach_y = scale * width / 2, scale * height / 2
    corners = np.stack([middle_x - reach_x, middle_y - reach_y, middle_x + reach_x, middle_y + reach_y], 1)
    frames = np.empty((3, len(zoom), height, width), np.float32)
    for i, box in enumerate(corners):
        if i and np.array_equal(box, corners[i - 1]):
            frames[:, i] = frames[:, i - 1]
        else:
            view = picture.resize((width, height), Image.Resampling.BILINEAR, tuple(box))
            frames[:, i] = np.asarray(view).transpose(2, 0, 1)
    return frames


def _rgb(colour) -> tuple:
    return tuple(int(np.clip(c, 0, 255)) for c in colour)


def _lighting(rng, size) -> np.ndarray:
    """Soft light falling over the wall, with gentle unevenness."""
    x = np.linspace(-1, 1, size[0], dtype=np.float32)
    y = np.linspace(-1, 1, size[1], dtype=np.float32)[:, None]
    side, top = rng.uniform(-0.16, 0.16), rng.uniform(-0.02, 0.12)
    light = 1 + side * x - top * y - 0.1 * (x * x + y * y)
    for _ in range(3):
        kx, ky = rng.normal(0, 3, 2)
        light = light + 0.02 * np.sin(kx * x + ky * y + rng.uniform(0, 6.28))
    return light.astype(np.float32)


class _Brush:
    """Draws in world units around the centre of a picture."""

    def __init__(self, image: Image.Image, unit: float):
        self.draw = ImageDraw.Draw(image)
        self.unit, self.cx, self.cy = unit, image.width / 2, image.height / 2
        self.right, self.bottom = self.cx / unit, self.cy / unit

    def _at(self, points):
        return [(self.cx + x * self.unit, self.cy + y * self.unit) for x, y in points]

    def rectangle(self, x0, y0, x1, y1, colour):
        self.draw.rectangle(self._at([(x0, y0), (x1, y1)]), fill=_rgb(colour))

    def disc(self, x, y, radius, colour):
        self.draw.ellipse(self._at([(x - radius, y - radius), (x + radius, y + radius)]), fill=_rgb(colour))

    def polygon(self, points, colour):
        self.draw.polygon(self._at(points), fill=_rgb(colour))


def _plain_wall(brush, rng, wall):
    """A wall with a skirting line and a framed picture or two."""
    for side in (-1, 1):
        if rng.random() < 0.75:
            x, y, w, h = (
                side * rng.uniform(0.8, 1.05),
                rng.uniform(-0.75, -0.4),
                rng.uniform(0.16, 0.28),
                rng.uniform(0.16, 0.3),
            )
            brush.rectangle(x - w, y - h, x + w, y + h, 0.5 * wall)
            brush.rectangle(x - 0.82 * w, y - 0.82 * h, x + 0.82 * w, y + 0.82 * h, _any_colour(rng))
            brush.disc(x, y + 0.1 * h, 0.4 * min(w, h), _any_colour(rng))
    brush.rectangle(-brush.right, 0.62, brush.right, brush.bottom, 0.84 * wall)


def _striped_wall(brush, rng, wall):
    pitch = rng.uniform(0.16, 0.34)
    for i in range(-20, 21):
        x = (i + 0.3) * pitch
        brush.rectangle(x, -brush.bottom, x + 0.5 * pitch, brush.bottom, 0.86 * wall)


def _bokeh_lights(brush, rng, wall):
    brush.rectangle(-brush.right, -brush.bottom, brush.right, brush.bottom, 0.42 * wall)
    for _ in range(44):
        x, y = rng.uniform(-brush.right, brush.right), rng.uniform(-brush.bottom, brush.bottom)
        colour = 0.42 * wall + rng.uniform(0.2, 0.6) * (_any_colour(rng) - 0.42 * wall)
        brush.disc(x, y, rng.uniform(0.05, 0.17), colour)


def _bookshelf(brush, rng, wall):
    wood = np.array((118, 82, 54)) * rng.uniform(0.8, 1.2)
    brush.rectangle(-brush.right, -brush.bottom, brush.right, brush.bottom, 0.55 * wood)
    pitch = rng.uniform(0.42, 0.55)
    for row in range(-5, 6):
        floor = row * pitch
        x = -brush.right
        while x < brush.right:
            w, h = rng.uniform(0.05, 0.11), rng.uniform(0.24, 0.36)
            if rng.random() < 0.88:
                brush.rectangle(x, floor - h, x + 0.92 * w, floor, 0.85 * _any_colour(rng))
            x += w
        brush.rectangle(-brush.right, floor, brush.right, floor + 0.05, wood)


def _window(brush, rng, wall):
    x, w = rng.choice([-1, 1]) * rng.uniform(0.45, 0.75), rng.uniform(0.42, 0.55)
    sky = rng.uniform((150, 196, 226), (190, 220, 240))
    brush.rectangle(x - w, -1.3, x + w, 0.42, 0.96 * np.array((236, 228, 214)))
    for left, right in ((x - 0.9 * w, x - 0.04), (x + 0.04, x + 0.9 * w)):
        brush.rectangle(left, -1.25, right, 0.34, sky)
        brush.rectangle(left, 0.05, right, 0.34, (122, 168, 110))
    brush.rectangle(-brush.right, 0.42, brush.right, brush.bottom, 0.85 * wall)
    for side in (-1.25, 1.0):
        brush.rectangle(x + side * w, -1.4, x + (side + 0.25) * w, 0.6, _any_colour(rng))


def _hills(brush, rng, wall):
    brush.rectangle(
        -brush.right, -brush.bottom, brush.right, brush.bottom, rng.uniform((150, 200, 232), (190, 224, 244))
    )
    x = np.linspace(-brush.right, brush.right, 60)
    for depth in range(3):
        tops = -0.1 + 0.28 * depth + 0.14 * np.sin(rng.uniform(1.5, 3.5) * x + rng.uniform(0, 6.28))
        green = np.array((126, 176, 120)) * (1.05 - 0.17 * depth)
        outline = [*zip(x, tops, strict=True), (brush.right, brush.bottom), (-brush.right, brush.bottom)]
        brush.polygon(outline, green)
    for _ in range(7):
        cx, cy = rng.uniform(-brush.right, brush.right), rng.uniform(-1.4, -0.5)
        for _ in range(4):
            brush.disc(cx + rng.normal(0, 0.12), cy + rng.normal(0, 0.025), rng.uniform(0.05, 0.1), (238, 242, 246))


def _tiles(brush, rng, wall):
    pitch = rng.uniform(0.22, 0.36)
    brush.rectangle(-brush.right, -brush.bottom, brush.right, brush.bottom, 0.78 * wall)
    for row in range(-8, 9):
        for col in range(-8, 9):
            x, y = (col + 0.5 * (row % 2)) * pitch, row * 0.6 * pitch
            tint = wall * rng.uniform(0.93, 1.05)
            brush.rectangle(x + 0.03 * pitch, y + 0.03 * pitch, x + 0.97 * pitch, y + 0.57 * pitch, tint)


def _any_colour(rng) -> np.ndarray:
    return np.asarray(CLOTHES[str(rng.choice(list(CLOTHES)))], float)


_PAINTERS = {
    "plain wall": _plain_wall,
    "striped wall": _striped_wall,
    "bokeh lights": _bokeh_lights,
    "bookshelf": _bookshelf,
    "window": _window,
    "hills": _hills,
    "tiles": _tiles,
}
