"""What is on a face: a head goes in, and its skin, eyes, brows, nose, mouth, beard and glasses are painted.

`paint_face` returns the two masks that training needs: the face and the lips.
"""

from dataclasses import replace

import numpy as np

from kavatar_jax.puppets.head import Head, Surface
from kavatar_jax.puppets.identity import Identity
from kavatar_jax.puppets.shapes import Canvas, between, disc, ring, soft, step, stroke
from kavatar_jax.puppets.state import Pose

MOUTH_Y = 0.26  # below the middle of the face
GAP = 0.27  # between the lips at mouth_open 1
JAW = 0.6  # how much of the gap a beard follows down
EYE_Y = -0.06
INSIDE = (62, 14, 26)
TONGUE = (206, 92, 92)
TEETH = (250, 248, 240)
SCLERA = (252, 252, 250)
INK = (38, 26, 30)


def paint_ears(head: Head):
    """Ears, behind the cheeks; the one turned away sinks behind the head."""
    skin, size = np.asarray(head.identity.skin), head.identity.ear_size
    for side in (-1, 1):
        x, y = head.turn(side * 0.99, 0.03, -0.12)
        window = head.window(x, y, 1.3 * size)
        u, v = window.x - x, window.y - y
        head.canvas.paint(window, disc(u, v, 0.78 * size, 1.15 * size, head.px), 0.93 * skin)
        head.canvas.paint(window, disc(u, v, 0.4 * size, 0.68 * size, head.px), 0.8 * skin)


def paint_face(head: Head) -> tuple[np.ndarray, np.ndarray]:
    """Masks (F, H, W) float32 of the skin of the face and of the lips with all between them."""
    _skin(head)
    if head.identity.beard != "none":
        _beard(head)
    for side in (-1, 1):
        _eye(head, side)
    mouth = head.feature(0, MOUTH_Y + 0.07, 0.3, 0.28)
    mouth = replace(mouth, y=mouth.y + 0.07)
    lips = paint_mouth(head.canvas, mouth, head.identity, head.pose)
    _nose(head)
    for side in (-1, 1):
        _brow(head, side)
    frames, (height, width) = len(head.px), head.canvas.rgb.shape[2:]
    masks = np.zeros((2, frames, height, width), np.float32)
    masks[0, :, head.front.rows, head.front.cols] = head.front.cover
    masks[1, :, mouth.rows, mouth.cols] = lips
    return masks[0], masks[1]


def paint_mouth(canvas: Canvas, part: Surface, identity: Identity, pose: Pose) -> np.ndarray:
    """Lips around a dark gap with teeth and tongue, on a surface whose origin is where the closed lips meet.

    Returns the coverage (F, h, w) of the lips with all that is between them.
    """
    px = part.px
    wide = 1 + 0.26 * pose.mouth_width + 0.14 * np.maximum(pose.smile, 0) - 0.06 * np.abs(pose.smile)
    half = identity.mouth_width * wide
    y = part.y
    u = part.x / half
    u2 = np.minimum(u * u, 1)
    arch = 1 - u2
    gap = GAP * pose.mouth_open
    corner = -0.085 * (pose.smile + 0.15) * (u2 - 0.55)  # corners rise, the middle sinks
    top = corner - 0.28 * gap * arch
    bottom = corner + 0.72 * gap * arch * (1 + 0.25 * u2)
    rounded = np.maximum(-pose.mouth_width, 0)
    full = identity.lip_fullness * (1 + 0.35 * rounded)
    rim = np.sqrt(arch)
    bow = 1 - 0.28 * np.maximum(1 - (u / 0.2) ** 2, 0)
    inside_mouth = np.abs(u) < 1
    cover = part.cover * inside_mouth
    lips = between(y, top - 1.5 * full * rim * bow, bottom + 2.0 * full * rim, px) * cover
    canvas.paint(part, lips, identity.lip, 1 - 1.6 * np.clip(top - y, 0, 0.06) + 1.2 * np.clip(y - bottom, 0, 0.06))
    line = between(y, top - 0.009, bottom + 0.009, px) * cover
    canvas.paint(part, 0.85 * line, 0.42 * np.asarray(identity.lip))
    hollow = between(y, top, bottom, px) * cover
    canvas.paint(part, hollow, INSIDE)
    tongue = disc(part.x, y - (0.72 * gap - 0.02), 0.62 * half, 0.42 * gap + 1e-3, px)
    canvas.paint(part, np.minimum(tongue, hollow) * step(pose.mouth_open, 0.25, 0.6), TONGUE)
    bite = pose.teeth * np.minimum(0.9 * gap, 0.055) * (0.4 + 0.6 * arch)
    canvas.paint(part, np.minimum(between(y, top, np.minimum(top + bite, bottom), px), hollow), TEETH)
    return lips


def paint_glasses(head: Head):
    """Frames over the eyes and a bridge between them; the arms run back to the ears."""
    gap, size = head.identity.eye_gap, 1.55 * head.identity.eye_size
    for side in (-1, 1):
        part = head.feature(side * gap, EYE_Y, 1.3 * size)
        if head.identity.glasses == "round":
            line = ring(part.x, part.y, size, 0.024, head.px)
        else:
            outside = np.maximum(np.abs(part.x) - 0.62 * size, 0), np.maximum(np.abs(part.y) - 0.45 * size, 0)
            line = soft(0.012 - np.abs(np.sqrt(outside[0] ** 2 + outside[1] ** 2) - 0.36 * size), head.px)
        head.canvas.paint(part, line * part.cover, INK)
    bridge = head.feature(0, EYE_Y - 0.02, gap)
    width = gap - size
    head.canvas.paint(bridge, stroke(bridge.x, bridge.y, -width, 0, width, 0, 0.012, head.px) * bridge.cover, INK)


def _skin(head: Head):
    """Skin with the light falling on a ball, rosy cheeks and freckles."""
    identity, pose, front = head.identity, head.pose, head.front
    lit = 0.93 + 0.09 * front.z + front.x * (0.16 * pose.light_x) - 0.07 * front.y
    head.canvas.paint(front, front.cover, identity.skin, lit)
    rosy = np.asarray(identity.skin) * (1.0, 0.72, 0.7)
    for side in (-1, 1):
        cheek = head.feature(side * 0.25, 0.14, 0.17)
        glow = np.maximum(1 - (cheek.x**2 + cheek.y**2) / 0.15**2, 0)
        strength = identity.blush + 0.2 * np.maximum(pose.smile, 0)
        head.canvas.paint(cheek, strength * glow * glow * cheek.cover, rosy)
        if identity.freckles:
            for x, y in ((-0.06, 0.0), (0.0, -0.035), (0.055, 0.01), (0.01, 0.045)):
                spot = disc(cheek.x - side * x, cheek.y - y + 0.02, 0.013, 0.012, head.px)
                head.canvas.paint(cheek, 0.55 * spot * cheek.cover, 0.72 * np.asarray(identity.skin))


def _beard(head: Head):
    """Hair on the lower face, leaving the lips and a rim of skin around them free."""
    identity, front = head.identity, head.front
    x, y, px = front.x, front.y - np.float32(MOUTH_Y), head.px
    drop = JAW * GAP * head.pose.mouth_open
    if identity.beard == "full beard":
        cheek = np.maximum(0.11 - 1.1 * np.maximum(np.abs(x) - 0.14, 0), -0.27)
        top = cheek + 0.008 * np.sin(60 * x) + drop * np.maximum(1 - (x / 0.25) ** 2, 0)
        cover = soft(y - top, 0.7 * px)
    elif identity.beard == "goatee":
        cover = disc(x, y - 0.185 - drop, 0.085, 0.075, 0.7 * px)
    else:
        arch = -0.062 + 0.9 * x * x
        cover = between(y, arch - 0.05 * np.maximum(1 - (x / 0.2) ** 2, 0), arch, px)
    head.canvas.paint(front, 0.92 * cover * front.cover, 0.8 * np.asarray(identity.hair))


def _eye(head: Head, side: int):
    identity, pose, px = head.identity, head.pose, head.px
    rx, ry = identity.eye_size, 0.98 * identity.eye_size
    part = head.feature(side * identity.eye_gap, EYE_Y, 1.4 * rx, 1.7 * ry)
    u = np.abs(part.x / rx)
    arch = 1 - u * u * np.minimum(u, 3)
    squint = 0.22 * np.maximum(pose.smile, 0)
    lower = (0.88 - squint) * ry * arch
    upper = (-0.84 + pose.blink * (1.62 - squint)) * ry * arch
    opened = between(part.y, upper, lower, px) * (u < 1) * part.cover
    head.canvas.paint(part, opened, SCLERA)
    iris_x, iris_y = part.x - 0.34 * rx * pose.gaze_x, part.y - 0.04 * ry - 0.3 * ry * pose.gaze_y
    for radius, colour in ((0.66, identity.eye), (0.36, (22, 16, 18))):
        head.canvas.paint(part, np.minimum(disc(iris_x, iris_y, radius * rx, radius * rx, px), opened), colour)
    gleam = disc(iris_x - 0.2 * rx, iris_y + 0.24 * rx, 0.17 * rx, 0.17 * rx, px)
    head.canvas.paint(part, np.minimum(gleam, opened), (255, 255, 255))
    lash = between(part.y, upper - 0.026, upper + 0.008, px) * np.clip((1.12 - u) * 12, 0, 1) * part.cover
    head.canvas.paint(part, lash, INK)


def _brow(head: Head, side: int):
    identity, pose = head.identity, head.pose
    reach = 1.25 * identity.eye_size
    part = head.feature(side * identity.eye_gap, EYE_Y - 0.18, 1.15 * reach, 0.16)
    u = side * part.x / reach  # -1 at the nose, 1 at the temple
    middle = -0.05 * pose.brow_raise + 0.045 * u * pose.brow_tilt + 0.03 * u * u
    half = identity.brow_weight * (1.15 - 0.4 * u) * np.sqrt(np.maximum(1 - u * u, 0))
    head.canvas.paint(part, between(part.y, middle - half, middle + half, head.px) * part.cover, identity.brow)


def _nose(head: Head):
    """A button that stands out from the face, so that it leads when the head turns."""
    skin, size = np.asarray(head.identity.skin), head.identity.nose_size
    x, y = head.place(0, 0.1, 1.22)
    window = head.window(x, y, 1.8 * size)
    u, v = window.x - x, window.y - y
    head.canvas.paint(window, 0.5 * disc(u, v - 0.3 * size, 1.12 * size, 0.9 * size, 0.5 * head.px), 0.78 * skin)
    head.canvas.paint(window, disc(u, v, size, 0.9 * size, head.px), skin * (0.98, 0.9, 0.88), 1 - 0.9 * v)
    head.canvas.paint(
        window, 0.5 * disc(u + 0.3 * size, v + 0.3 * size, 0.26 * size, 0.2 * size, head.px), (255, 250, 244)
    )
