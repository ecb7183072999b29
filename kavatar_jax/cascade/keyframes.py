"""The frames that neighbouring clips share: for each cut of the storyline the best blueprint frame around it.

A good anchor looks like the portrait, moves, is sharp, and where faces can be found has open eyes, nothing before the face
and a mouth near closed, because it has to agree with the speech on both sides. Kling-Avatar (arXiv 2509.09595, section 2.2)
names the first criteria and gives no formula; the weights are ours.
"""

from typing import Any

import numpy as np
from scipy import ndimage

from kavatar_jax.cascade.encode import embed_faces
from kavatar_jax.cascade.stitch import decode
from kavatar_jax.cascade.weights import Weights
from kavatar_jax.config import Config
from kavatar_jax.director.cuts import cut_points
from kavatar_jax.media.faces import find_faces
from kavatar_jax.media.image import resize
from kavatar_jax.types import Blueprint, Conditions, Keyframes, Report, Storyline

# weight of each criterion, all scaled to about 0..1: identity first, then what a viewer would see at a joint
IDENTITY, CLARITY, MOTION, FACE, MOUTH, EYES, NEARNESS = 1.0, 0.3, 0.2, 1.0, 0.5, 0.5, 0.1


def pick_keyframes(
    blueprint: Blueprint, storyline: Storyline, conditions: Conditions, weights: Weights, config: Config,
    report: Report, landmarker: Any | None = None,
) -> Keyframes:  # fmt: skip
    """Cut times on the grid of latent frames, and their frames enlarged to the size of the video.

    The first keyframe is the portrait itself. landmarker: from media.faces, None where faces cannot be found.
    """
    window = config.sampling.window_frames
    nominal = cut_points(storyline, fps=config.fps, window_frames=window, frames=max(2, blueprint.frames))
    around = [_candidates(cut, i, nominal, config) for i, cut in enumerate(nominal)]
    wanted = sorted({frame for frames in around for frame in frames})
    seen = _collect(blueprint, wanted, weights, config, report)
    scores = _score(seen, conditions, weights, config, landmarker)
    radius = max(1.0, config.cascade.search_seconds * config.fps)
    worth = [
        {f: scores[f] - NEARNESS * abs(f - cut) / radius for f in frames}
        for cut, frames in zip(nominal, around, strict=True)
    ]
    cuts = _best_path(worth, window - 1)
    size = (config.width, config.height)
    images = [conditions.portrait] + [resize(seen[cut], size) for cut in cuts[1:]]
    return Keyframes(images=np.stack(images), cuts=tuple(cuts))


def _candidates(cut: int, i: int, nominal: list[int], config: Config) -> list[int]:
    """Grid frames around a cut, less than half-way to its neighbours; the ends of the video stay where they are."""
    if i in (0, len(nominal) - 1):
        return [cut]
    radius = config.cascade.search_seconds * config.fps
    low = max(cut - radius, (nominal[i - 1] + cut) / 2)
    high = min(cut + radius, (cut + nominal[i + 1]) / 2)
    return [f for f in range(cut - 4 * int(radius // 4), cut + int(radius) + 1, 4) if f == cut or low < f < high]


def _collect(blueprint: Blueprint, wanted: list[int], weights, config, report) -> dict[int, np.ndarray]:
    """The wanted frames of the blueprint, decoded in passing; two frames on either side give their motion."""
    seen, total = {}, 4 * (len(blueprint.latents) - 1) + 1
    for number, image in enumerate(decode(blueprint.latents, weights, config)):
        if number in wanted:
            seen[number] = image
        report("choosing keyframes", number + 1, total)
    return seen


def _score(seen: dict[int, np.ndarray], conditions: Conditions, weights, config, landmarker) -> dict[int, float]:
    """How good an anchor each frame is; higher is better."""
    frames, images = list(seen), np.stack(list(seen.values()))
    embeddings, wanted = embed_faces(images, weights, config), conditions.face_embedding
    lengths = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(wanted)
    identity = embeddings @ wanted / np.maximum(lengths, 1e-6)
    grey = images.astype(np.float32).mean(axis=-1)
    clarity = _spread([float(ndimage.laplace(image).var()) for image in grey])
    blurred = ndimage.gaussian_filter(grey, (0, 3, 3))
    motion = _spread(np.abs(blurred - blurred.mean(axis=0)).mean(axis=(1, 2)))
    total = IDENTITY * identity + CLARITY * clarity + MOTION * motion
    if landmarker is not None:
        total = total + np.array([_face_score(landmarker, image) for image in images])
    return dict(zip(frames, total.tolist(), strict=True))


def _face_score(landmarker, image: np.ndarray) -> float:
    """A face that is found (nothing before it), open eyes, a mouth near closed."""
    faces = find_faces(landmarker, image)
    if not faces:
        return 0.0
    shapes = faces[0].blendshapes
    blink = max(shapes["eyeBlinkLeft"], shapes["eyeBlinkRight"])
    return FACE + EYES * (1 - blink) + MOUTH * (1 - shapes["jawOpen"])


def _spread(values) -> np.ndarray:
    """Values moved and scaled to 0..1 over the candidates."""
    values = np.asarray(values, np.float64)
    return (values - values.min()) / max(float(np.ptp(values)), 1e-9)


def _best_path(worth: list[dict[int, float]], longest: int) -> list[int]:
    """One frame per cut, the best in sum whose neighbours lie at most `longest` apart."""
    best = {frame: (value, [frame]) for frame, value in worth[0].items()}
    for options in worth[1:]:
        best = {
            frame: max(
                ((score + value, [*path, frame]) for last, (score, path) in best.items() if 0 < frame - last <= longest)
            )
            for frame, value in options.items()
            if any(0 < frame - last <= longest for last in best)
        }
    return max(best.values())[1]
