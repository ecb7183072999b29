"""Request and storyline to conditions: words and face become arrays, each computed once for the whole video."""

import numpy as np

from kavatar_jax.cascade.hear import plan_latents
from kavatar_jax.cascade.weights import Weights
from kavatar_jax.config import Config, UMT5Config
from kavatar_jax.media.wear import wear
from kavatar_jax.models import clip, umt5
from kavatar_jax.parallel.programs import program
from kavatar_jax.parallel.sharding import constrain
from kavatar_jax.types import Conditions, Params, Report, Request, Storyline

TEXTS_AT_ONCE = 4  # for which the encoder's weights are brought once; a video has about so many


def encode(request: Request, storyline: Storyline, weights: Weights, config: Config, report: Report) -> Conditions:
    prompts = [shot.prompt for shot in storyline.shots]
    negatives = [", ".join(filter(None, (config.negative_prompt, shot.negative))) for shot in storyline.shots]
    unique = list(dict.fromkeys(prompts + negatives))
    row = {text: i for i, text in enumerate(unique)}
    face = look_at(request.portrait, weights, config)
    worn = look_at(wear(request.portrait), weights, config) if config.sampling.frame_scale != 1 else None
    frames, _ = plan_latents(len(request.speech.samples), config.fps, config.sampling)
    return Conditions(
        frames=frames,
        fps=config.fps,
        seed=request.seed,
        texts=encode_texts(unique, weights, config, report),
        spans=np.array([(shot.start, shot.end) for shot in storyline.shots]),
        prompts=np.array([row[text] for text in prompts], np.int32),
        negatives=np.array([row[text] for text in negatives], np.int32),
        face=np.asarray(face.tokens),
        face_embedding=np.asarray(face.embedding[0]),
        portrait=request.portrait,
        speech=request.speech.samples,
        director=None if storyline.hidden is None else storyline.hidden[None],
        worn_face=None if worn is None else np.asarray(worn.tokens),
    )


def to_signed(image: np.ndarray) -> np.ndarray:
    """uint8 pixels -> float32 in [-1, 1]."""
    return image.astype(np.float32) / 127.5 - 1


def embed_faces(images: np.ndarray, weights: Weights, config: Config) -> np.ndarray:
    """Identity embeddings of (n, H, W, 3) uint8 images: (n, E)."""
    return np.stack([np.asarray(look_at(image, weights, config).embedding[0]) for image in images])


def look_at(image: np.ndarray, weights: Weights, config: Config) -> clip.Outputs:
    """What the image encoder makes of one picture, (H, W, 3) uint8: tokens (1, L, D) and an embedding (1, E)."""
    return _see(config.image, weights.image, clip.preprocess(to_signed(image)[None], config.image))


def encode_texts(texts: list[str], weights: Weights, config: Config, report: Report) -> np.ndarray:
    """(N, text_length, D), zero rows after the last token: what the transformer expects of padding."""
    features = np.zeros((len(texts), config.dit.text_length, config.text.width), np.float32)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[start : start + TEXTS_AT_ONCE]
        ids, mask = weights.tokenizer(some + some[-1:] * (TEXTS_AT_ONCE - len(some)), config.dit.text_length)
        features[start:][: len(some)] = np.asarray(read(config.text, weights.text, ids, mask))[: len(some)]
        report("reading prompts", start + len(some), len(texts))
    return features


def shot_at(conditions: Conditions, start: float, end: float) -> int:
    """The shot that fills most of the seconds from start to end."""
    shared = np.minimum(conditions.spans[:, 1], end) - np.maximum(conditions.spans[:, 0], start)
    return int(np.argmax(shared))


@program(static_argnums=0)
def read(config: UMT5Config, params: Params, ids, mask):
    """The text encoder's program: (TEXTS_AT_ONCE, L) token ids and mask -> (TEXTS_AT_ONCE, L, D), on every device."""
    return constrain(umt5.UMT5(config).apply({"params": params}, ids, mask), None, None, None)


@program(static_argnums=0)
def _see(config, params, pixels):
    return clip.CLIP(config).apply({"params": params}, pixels)
