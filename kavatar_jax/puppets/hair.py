"""What grows on a head, or is worn on it: a head goes in, and hair is painted behind it and over it.

Hair over the head is a slightly larger ball, kept where it lies above a hairline that turns with the head.
"""

from dataclasses import dataclass

import numpy as np

from kavatar_jax.puppets.head import Head, Surface
from kavatar_jax.puppets.shapes import Window, disc, soft, step, stroke


@dataclass(frozen=True)
class _Cut:
    """swell, rise: the ball of hair against that of the face; line: height of the hairline in the middle (-1 crown,
    1 chin); fall: how much lower it runs at the temples; skew: how much lower on one side; curtain: hair beside the
    cheeks; waves, depth: locks along the hairline; bumps, bulge: locks along the outline; nape: how fast the hairline
    falls behind the ears; back: what hangs behind."""

    swell: float = 1.08
    rise: float = 0.03
    line: float = -0.58
    fall: float = 0.55
    skew: float = 0.0
    curtain: float = 0.0
    waves: float = 0.0
    depth: float = 0.0
    bumps: float = 0.0
    bulge: float = 0.0
    nape: float = 2.2
    back: str = ""


_CUTS = {
    "buzz cut": _Cut(swell=1.025, rise=0.005, line=-0.6, fall=0.5),
    "short": _Cut(swell=1.09, rise=0.035, line=-0.52, fall=0.45, waves=9, depth=0.05, bumps=9, bulge=0.012),
    "side parting": _Cut(swell=1.1, rise=0.045, line=-0.6, fall=0.5, skew=0.26, waves=5, depth=0.03),
    "spiky": _Cut(swell=1.1, rise=0.06, line=-0.5, fall=0.35, waves=13, depth=0.11, bumps=13, bulge=0.085),
    "curly": _Cut(swell=1.17, rise=0.05, line=-0.5, fall=0.4, waves=14, depth=0.06, bumps=12, bulge=0.045),
    "bob": _Cut(swell=1.11, rise=0.03, line=-0.42, fall=0.1, curtain=5.0, waves=7, depth=0.025, back="bob"),
    "long": _Cut(swell=1.1, rise=0.03, line=-0.66, fall=1.25, skew=0.1, curtain=5.0, back="long"),
    "bun": _Cut(swell=1.06, rise=0.025, line=-0.6, fall=0.55, back="bun"),
    "ponytail": _Cut(swell=1.07, rise=0.025, line=-0.55, fall=0.5, waves=5, depth=0.06, skew=0.08, back="ponytail"),
    "beanie": _Cut(swell=1.1, rise=0.055, line=-0.46, fall=0.12, nape=0.0),
}


def paint_back_hair(head: Head):
    """The part that hangs behind the face, neck and shoulders."""
    identity = head.identity
    cut = _CUTS.get(identity.hair_style, _Cut())
    a, b, px, dark = identity.face_width, identity.face_height, head.px, 0.84 * np.asarray(identity.hair)
    if cut.back in ("bob", "long"):
        x, y = head.turn(0, 0.0, -0.25)
        low = 1.05 * b if cut.back == "bob" else 1.6 * b
        window = head.window(x, y + 0.2, 1.6 * a, 1.7 * b)
        u, v = window.x - x, window.y - y
        half = a * (1.22 - 0.06 * np.cos(3.0 * v)) * (1 if cut.back == "bob" else 1 + 0.1 * step(v, 0, b))
        width = half * np.sqrt(np.clip(1 - np.maximum(-v / (1.12 * b), 0) ** 2, 0, 1))
        bottom = low - 0.5 * u * u + 0.015 * np.sin(26 * u)
        cover = soft(width - np.abs(u), px) * soft(bottom - v, px) * (width > 0)
        head.canvas.paint(window, cover, dark, 1 + 0.07 * np.sin(60 * u + 2 * v))
    elif cut.back == "bun":
        x, y = head.turn(0, -1.12, -0.35)
        window = head.window(x, y, 0.24)
        u, v = window.x - x, window.y - y
        head.canvas.paint(window, disc(u, v, 0.2, 0.18, px), identity.hair, 0.95 - 0.6 * v)
    elif cut.back == "ponytail":
        x, y = head.turn(0.35, -0.55, -1.0)
        window = head.window(x + 0.2, y + 0.3, 0.45, 0.75)
        u, v = window.x - x, window.y - y
        swing = 0.3 + 0.05 * head.pose.sway_x
        cover = np.maximum(
            stroke(u, v, 0.22, 0.02, swing + 0.1, 0.4, 0.125, px),
            stroke(u, v, swing + 0.1, 0.4, swing, 0.75, 0.085, px),
        )
        head.canvas.paint(window, cover, dark, 1 + 0.06 * np.sin(50 * u))


def paint_hair(head: Head) -> tuple[Surface, np.ndarray]:
    """The part on the head, hair above its hairline or a knitted hat; returns where it is, and its coverage."""
    identity = head.identity
    if identity.hair_style == "bald":
        return head.front, np.zeros_like(head.front.cover)
    cut = _CUTS[identity.hair_style]
    reach = cut.swell + cut.bulge
    wide, tall = 1.02 * reach * identity.face_width, reach * identity.face_height
    window = head.window(0, -0.2 * tall - cut.rise, wide, 0.85 * tall)
    shell = head.ball(window, cut.swell, cut.rise)
    x, y = shell.x / identity.face_width, shell.y / identity.face_height
    cover = _outline(head, window, cut) if cut.bumps else shell.cover
    line = cut.line + cut.fall * x * x + cut.skew * x + cut.nape * np.maximum(-0.2 - shell.z, 0)
    if cut.depth:
        line = line + cut.depth * np.abs(np.sin(cut.waves * x + 1.0))
    if cut.curtain:
        line = line + cut.curtain * np.maximum(np.abs(x) - 0.8, 0)
    if identity.hair_style == "beanie":
        return shell, _paint_hat(head, shell, y, line, cover)
    slope = 1 / np.sqrt(1 + (2 * cut.fall * x) ** 2)
    grown = soft((line - y) * slope * np.float32(identity.face_height), head.px) * cover
    gloss = np.maximum(1 - ((y + 0.72 + 0.15 * head.pose.light_x * x) / 0.16) ** 2, 0) * (shell.z > 0)
    strands = 0.03 * np.sin(23 * x + 4 * y) + 0.03 * np.sin(41 * x - 6 * y)
    head.canvas.paint(shell, grown, identity.hair, 0.92 + 0.2 * gloss + strands + 0.12 * head.pose.light_x * x)
    return shell, grown


def _outline(head: Head, window: Window, cut: _Cut) -> np.ndarray:
    """Coverage of a ball whose outline bulges into locks."""
    a, b = cut.swell * head.identity.face_width, cut.swell * head.identity.face_height
    x, y = window.x / a, (window.y + cut.rise) / b
    angle = np.arctan2(x, -y) + 0.25 * np.radians(head.pose.yaw)
    reach = 1 + cut.bulge * (np.abs(np.cos(0.5 * cut.bumps * angle)) - 0.4) * step(-y, -0.6, 0.0)
    return soft((reach - np.sqrt(x * x + y * y)) * np.float32(0.5 * (a + b)), head.px)


def _paint_hat(head: Head, shell: Surface, y, line, cover) -> np.ndarray:
    """A knitted hat in the second colour of the clothes, ribbed, with a turned-up brim."""
    identity = head.identity
    height, px = np.float32(identity.face_height), head.px
    worn = soft((line - y) * height, px) * cover
    ribs = 1 + 0.07 * np.sin(30 * shell.x / identity.face_width)
    head.canvas.paint(shell, worn, identity.trim, ribs)
    brim = worn * soft((y - line + 0.24) * height, px)
    head.canvas.paint(shell, brim, 0.8 * np.asarray(identity.trim), ribs)
    return worn
