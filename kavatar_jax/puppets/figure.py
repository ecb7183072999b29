"""Below and beside the head: neck, clothes and one raised hand are painted on a canvas."""

import numpy as np

from kavatar_jax.puppets.identity import Identity
from kavatar_jax.puppets.shapes import Canvas, Window, between, disc, soft, stroke
from kavatar_jax.puppets.state import Pose

SHOULDERS = 0.7  # height of the neckline
_FINGERS = ((-0.075, -0.105, -0.265), (-0.025, -0.035, -0.315), (0.028, 0.036, -0.3), (0.078, 0.1, -0.235))
"""x of the knuckle, x and y of the tip, from the wrist."""


def paint_body(canvas: Canvas, identity: Identity, pose: Pose):
    """Neck, then shoulders and chest in clothes; the chest rises with the breath."""
    _neck(canvas, identity, pose)
    scale = 1 + 0.05 * pose.lean
    top = SHOULDERS + pose.sway_y - 0.02 * pose.breath
    window = canvas.window(pose.sway_x, 1.6, 1.3, 1.05)
    window = window.moved(pose.sway_x, top)
    x, y, px = window.x / scale, window.y / scale, window.px * scale
    side = np.abs(x)
    k = side / np.float32(identity.shoulder_width)
    slope = 0.1 * k * k + 0.24 * np.maximum(k - 0.55, 0) ** 2 + 3.2 * np.maximum(k - 0.9, 0) ** 2
    shoulder = slope - 0.05 * np.exp(-((x / 0.2) ** 2))
    depth, slant = _NECKLINES[identity.garment]
    edge = np.maximum(shoulder, depth - slant * side)
    cloth = soft((y - edge) * (1 / (1 + 2.5 * np.maximum(k - 0.8, 0))), px)
    lit = 1.02 - 0.12 * k * k + 0.14 * x * pose.light_x - 0.05 * np.maximum(y, 0)
    canvas.paint(window, cloth, identity.clothes, lit)
    _GARMENTS[identity.garment](canvas, identity, Window(window.rows, window.cols, x, y, px), cloth)


def paint_hand(canvas: Canvas, identity: Identity, pose: Pose):
    """A forearm that comes up beside the head, palm to the camera; hidden below the frame at hand 0."""
    if not np.any(pose.hand > 0.01):
        return
    skin = np.asarray(identity.skin)
    side = pose.hand_side
    wrist_x = side * (0.74 + 0.06 * (1 - pose.hand)) + pose.sway_x
    wrist_y = 1.55 - 1.13 * pose.hand + pose.sway_y
    window = canvas.window(wrist_x, wrist_y + 0.15, 0.42, 0.75)
    arm = window.moved(wrist_x, wrist_y)
    sleeve = stroke(arm.x, arm.y, 0.0, 0.2, 0.08 * side, 1.2, 0.13, window.px)
    canvas.paint(window, sleeve, identity.clothes, 0.94 + 0.9 * np.clip(0.06 - np.abs(arm.x), -0.1, 0.06))
    cuff = stroke(arm.x, arm.y, -0.11, 0.16, 0.11, 0.16, 0.035, window.px)
    hand = window.moved(wrist_x, wrist_y, 0.35 * pose.wave + 0.12 * side)
    x, y, px = hand.x * side, hand.y, window.px
    palm = np.maximum(disc(x, y + 0.02, 0.115, 0.13, px), stroke(x, y, 0, 0.02, 0, 0.2, 0.075, px))
    cover = np.maximum(palm, stroke(x, y, -0.08, 0.02, -0.185, -0.1, 0.036, px))
    for base, tip_x, tip_y in _FINGERS:
        cover = np.maximum(cover, stroke(x, y, base, -0.06, tip_x, tip_y, 0.031, px))
    canvas.paint(window, cover, skin, 0.98 - 0.2 * y)
    lines = np.maximum(
        stroke(x, y, -0.03, 0.05, 0.05, -0.03, 0.006, px), stroke(x, y, -0.06, -0.01, 0.03, -0.06, 0.006, px)
    )
    canvas.paint(window, 0.5 * lines, 0.75 * skin)
    canvas.paint(window, cuff, 0.8 * np.asarray(identity.clothes))


def _neck(canvas: Canvas, identity: Identity, pose: Pose):
    skin = np.asarray(identity.skin)
    middle = 0.5 * (pose.head_x + pose.sway_x)
    window = canvas.window(middle, 0.55, 0.3, 0.5)
    lean = (pose.head_x - pose.sway_x) / 0.64
    x = window.x - pose.sway_x - lean * np.clip(0.6 - window.y, -0.1, 0.6)
    flare = 0.16 + 0.5 * np.maximum(window.y - 0.6, 0) ** 2
    cover = soft(flare - np.abs(x), window.px) * (window.y > 0.0)
    canvas.paint(window, cover, 0.9 * skin)
    chin = pose.head_y + identity.face_height * pose.head_scale
    shadow = soft(chin + 0.07 - 1.4 * x * x - window.y, 0.5 * window.px)
    canvas.paint(window, 0.8 * cover * shadow, 0.74 * skin)


def _t_shirt(canvas, identity, at: Window, cloth):
    neckline = 0.06 - 0.35 * np.abs(at.x)
    canvas.paint(at, between(at.y, neckline, neckline + 0.035, at.px) * cloth, 0.78 * np.asarray(identity.clothes))


def _v_neck(canvas, identity, at: Window, cloth):
    edge = 0.2 - 1.25 * np.abs(at.x)
    canvas.paint(at, between(at.y, edge, edge + 0.05, at.px) * cloth, identity.trim)


def _shirt(canvas, identity, at: Window, cloth):
    edge = 0.12 - 0.9 * np.abs(at.x)
    collar = between(at.y, edge, 0.16 - 0.45 * np.abs(at.x), at.px) * soft(0.24 - np.abs(at.x), at.px)
    canvas.paint(at, collar * cloth, 0.5 * np.asarray(identity.clothes) + 120)
    canvas.paint(at, soft(0.007 - np.abs(at.x), at.px) * (at.y > 0.12) * cloth, 0.72 * np.asarray(identity.clothes))
    for height in (0.2, 0.32):
        canvas.paint(at, disc(at.x, at.y - height, 0.018, 0.018, at.px), 0.5 * np.asarray(identity.clothes) + 110)


def _suit(canvas, identity, at: Window, cloth):
    opening = soft(0.2 - np.abs(at.x) - 0.42 * np.maximum(at.y, -1), at.px)
    canvas.paint(at, opening * cloth, (232, 234, 238))
    lapel = soft(0.31 - np.abs(at.x) - 0.38 * at.y, at.px) * (1 - opening)
    canvas.paint(at, 0.9 * lapel * cloth * (at.y > -0.02), 0.72 * np.asarray(identity.clothes))
    tie = soft(0.032 + 0.07 * np.clip(at.y, 0, 0.6) - np.abs(at.x), at.px) * soft(at.y + 0.02, at.px)
    canvas.paint(at, tie * cloth, identity.trim)


def _hoodie(canvas, identity, at: Window, cloth):
    hood = between(at.y, -1, 0.15 - 1.6 * at.x * at.x, at.px)
    canvas.paint(at, hood * cloth, 0.8 * np.asarray(identity.clothes))
    for side in (-1, 1):
        cord = stroke(at.x, at.y, side * 0.09, 0.1, side * 0.1, 0.3, 0.011, at.px)
        canvas.paint(at, cord, (238, 236, 230))


def _striped(canvas, identity, at: Window, cloth):
    stripes = np.clip(np.sin(34 * (at.y - 0.12 * at.x * at.x)) * 2.0 + 0.5, 0, 1)
    canvas.paint(at, stripes * cloth, identity.trim)
    _t_shirt(canvas, identity, at, cloth)


def _dotted(canvas, identity, at: Window, cloth):
    u, v = at.x * 8, at.y * 8
    shift = 0.5 * (np.floor(v) % 2)
    dots = disc((u + shift) % 1 - 0.5, v % 1 - 0.5, 0.27, 0.27, at.px / 8)
    canvas.paint(at, dots * cloth, identity.trim)
    _t_shirt(canvas, identity, at, cloth)


_GARMENTS = {
    "T-shirt": _t_shirt,
    "V-neck": _v_neck,
    "shirt": _shirt,
    "suit": _suit,
    "hoodie": _hoodie,
    "striped top": _striped,
    "dotted top": _dotted,
}
# how far below the shoulders the neckline begins, how steeply it rises to the sides
_NECKLINES = {
    "T-shirt": (0.06, 0.35),
    "V-neck": (0.2, 1.25),
    "shirt": (0.12, 0.9),
    "suit": (0.04, 0.9),
    "hoodie": (0.05, 0.4),
    "striped top": (0.06, 0.35),
    "dotted top": (0.06, 0.35),
}
