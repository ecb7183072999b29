"""Reading a puppet's state back from pixels alone: frames and, if there is one, the portrait go in, readings come out.

The camera and the head are followed from frame to frame (`track`), the mouth is then drawn until it matches (`lips`).
Measured on 30 held-out clips of 40 frames at 128x128, pooled over clips; worn: blurred by 1.3 pixels, noise of 10
levels, JPEG of quality 30; shrunk: to a third and back. Correlation with the truth, and mean error:

    | | clean | worn | shrunk |
    |---|---|---|---|
    | mouth_open | .994, .016 | .985, .029 | .988, .021 |
    | mouth_width | .87, .15 | .79, .19 | .85, .16 |
    | smile | .974, .09 | .934, .15 | .947, .14 |
    | yaw, degrees | .991, .5 | .986, .7 | .985, .7 |
    | pitch, degrees | .987, .4 | .975, .6 | .980, 1.1 |
    | roll, degrees | .969, .4 | .957, .5 | .956, .5 |
    | blink | .95, .02 | .89, .08 | .92, .07 |
    | zoom | .9995, .001 | .991, .005 | .998, .004 |
    | hand | .93, .07 | .93, .11 | .93, .08 |

Within single clips the mouth's opening correlates at .998, .992 and .994 (medians), at .97, .94 and .94 at worst. Smile
tells emotions apart; its small changes within one are not read. About 20 ms a frame on one core.
"""

from dataclasses import dataclass

import numpy as np

from kavatar_jax.puppets import align, lips
from kavatar_jax.puppets.backdrop import DISTANT
from kavatar_jax.puppets.face import EYE_Y
from kavatar_jax.puppets.track import TALL, WIDE, Tracks, at_rest, head_warp, through_camera, track


@dataclass(frozen=True)
class Reading:
    """What is seen in each frame; named and scaled as in `state.RANGES`.

    mouth_open, mouth_width, smile, yaw, pitch, roll, blink, zoom, hand: (F,)
    skin, hair, clothes, background: (F, 3) mean RGB 0..255 of a region that keeps to the part; for a puppet without
    hair, `hair` is the top of its head
    """

    mouth_open: np.ndarray
    mouth_width: np.ndarray
    smile: np.ndarray
    yaw: np.ndarray
    pitch: np.ndarray
    roll: np.ndarray
    blink: np.ndarray
    zoom: np.ndarray
    hand: np.ndarray
    skin: np.ndarray
    hair: np.ndarray
    clothes: np.ndarray
    background: np.ndarray


def read(frames: np.ndarray, portrait: np.ndarray | None = None) -> Reading:
    """Read every frame of one clip of one puppet.

    frames: (F, H, W, 3) uint8; portrait: (H, W, 3) uint8, the puppet at rest. Without it the first frame takes its place:
    angles, zoom, blink and hand are then changes since that frame, and the mouth is shut where it is most nearly so.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}; read wants uint8 (F, H, W, 3) of at least one frame"
        )
    if portrait is not None and portrait.shape != frames.shape[1:]:
        raise ValueError(f"portrait is {portrait.shape}, a frame {frames.shape[1:]}; fit the portrait to the frames")
    still = frames[0] if portrait is None else portrait
    video, still = frames.astype(np.float32) / 255, still.astype(np.float32) / 255
    tracks = track(video, still)
    mouths = _unwarp(video, tracks.head, lips.grid())
    shut = _unwarp(still[None], at_rest(1), lips.grid())[0] if portrait is not None else _most_shut(mouths)
    shapes = lips.read_lips(mouths, shut)
    return Reading(
        mouth_open=shapes[:, 0],
        mouth_width=shapes[:, 1],
        smile=shapes[:, 2],
        yaw=tracks.head[:, 0],
        pitch=tracks.head[:, 1],
        roll=tracks.head[:, 2],
        blink=_blink(video, still, tracks),
        zoom=_zoom(tracks),
        hand=_hand(video, still, tracks),
        **_colours(video, tracks),
    )


def _unwarp(video: np.ndarray, heads: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(F, N, 3): colours at (2, N) points of the face, wherever the head has carried them."""
    warp = head_warp(points, video.shape[1:3])
    return np.stack([align.sample(frame, warp(head)[0]) for frame, head in zip(video, heads, strict=True)])


def _most_shut(mouths: np.ndarray) -> np.ndarray:
    """The picture in which the middle of the mouth differs least from the face around it."""
    x, y = lips.grid()
    middle = (np.abs(x) < 0.1) & (y > 0.2) & (y < 0.5)
    around = (np.abs(x) > 0.22) & (y < 0.3)
    unlike = np.abs(mouths[:, middle] - np.median(mouths[:, around], 1)[:, None]).mean((1, 2))
    return mouths[unlike.argmin()]


def _blink(video: np.ndarray, still: np.ndarray, tracks: Tracks) -> np.ndarray:
    """How little is left of what open eyes show, against skin, where shut lids show skin.

    Open eyes are the portrait's, or fainter ones if most of the clip shows them so: blur takes contrast.
    """
    x, y = np.meshgrid(np.arange(-0.055, 0.056, 0.011), np.arange(-0.06, 0.021, 0.01))
    openness = []
    for side in (-1, 1):
        eye = np.stack([x.ravel() + 0.2 * side, y.ravel() + EYE_Y])
        cheek = np.stack([x.ravel() + 0.2 * side, 0.7 * y.ravel() + 0.18])  # below any glasses
        contrasts = []
        for pictures, heads in ((video, tracks.head), (still[None], at_rest(1))):
            skin = np.median(_unwarp(pictures, heads, cheek), 1)
            contrasts.append(np.abs(_unwarp(pictures, heads, eye) - skin[:, None]).mean((1, 2)) / (skin.mean(1) + 0.05))
        usual = np.clip(np.percentile(contrasts[0], 80), 0.5 * contrasts[1], contrasts[1])
        openness.append(contrasts[0] / np.maximum(usual, 1e-3))
    return np.clip((1 - np.mean(openness, 0)) / 0.8, 0, 1)  # a lid's own shading leaves a fifth


def _zoom(tracks: Tracks) -> np.ndarray:
    """The far wall's zoom, drawn towards the head's size where the wall shows too little to tell."""
    wall, head = tracks.camera[:, 0], np.exp(tracks.head[:, 3])
    trust = 0.06**2 / (0.06**2 + tracks.camera_spread**2)  # heads also grow and shrink by leaning, some 6 %
    return trust * wall + (1 - trust) * head


def _hand(video: np.ndarray, still: np.ndarray, tracks: Tracks) -> np.ndarray:
    """How much has become like skin, that was not, beside the shoulders."""
    x, y = np.meshgrid(np.arange(0.62, 0.95, 0.04), np.arange(0.0, 0.9, 0.04))
    skin = np.median(_unwarp(still[None], at_rest(1), _cheeks())[0], 0)
    sides = []
    for side in (-1, 1):
        points, size = np.stack([side * x.ravel(), y.ravel()]), still.shape
        before = align.sample(still, through_camera(points, (1.0, 0.0, 0.0), size))
        views = zip(video, tracks.camera, strict=True)
        seen = np.stack([align.sample(frame, through_camera(points, camera, size)) for frame, camera in views])
        unlike = np.maximum(np.linalg.norm(before - skin, axis=1), 0.05)
        sides.append(np.clip(1 - np.linalg.norm(seen - skin, axis=2) / unlike, 0, 1).mean(1))
    return np.clip(np.max(sides, 0) / 0.36, 0, 1)  # a raised hand covers some 36 % of the region


def _colours(video: np.ndarray, tracks: Tracks) -> dict[str, np.ndarray]:
    """Mean colours of regions that follow the head, the body or the wall."""
    angles, radii = np.meshgrid(np.radians(np.arange(-50, 51, 5)), np.arange(0.9, 1.0, 0.03))
    crown = np.stack([WIDE * (radii * np.sin(angles)).ravel(), -TALL * (radii * np.cos(angles)).ravel()])
    outline = head_warp(crown, video.shape[1:3], np.ones(crown.shape[1], bool))
    x, y = np.meshgrid(np.arange(0.3, 0.56, 0.03), np.arange(0.88, 1.0, 0.03))
    chest = np.concatenate([np.stack([s * x.ravel(), y.ravel()]) for s in (-1, 1)], 1)
    x, y = np.meshgrid(np.arange(0.72, 0.96, 0.03), np.arange(-0.9, 0.2, 0.03))
    wall = np.concatenate([np.stack([s * x.ravel(), y.ravel()]) for s in (-1, 1)], 1)
    colours = {"skin": np.median(_unwarp(video, tracks.head, _cheeks()), 1)}
    parts = {"hair": [], "clothes": [], "background": []}
    for frame, head, camera in zip(video, tracks.head, tracks.camera, strict=True):
        parts["hair"].append(align.sample(frame, outline(head)[0]).mean(0))
        parts["clothes"].append(align.sample(frame, through_camera(chest, camera, frame.shape)).mean(0))
        parts["background"].append(align.sample(frame, through_camera(wall, camera, frame.shape, DISTANT)).mean(0))
    colours |= {name: np.array(values) for name, values in parts.items()}
    return {name: 255 * values for name, values in colours.items()}


def _cheeks() -> np.ndarray:
    x, y = np.meshgrid(np.arange(0.13, 0.3, 0.02), np.arange(0.13, 0.2, 0.02))
    return np.concatenate([np.stack([side * x.ravel(), y.ravel()]) for side in (-1, 1)], 1)
