"""The sliding-window sampler around a stand-in network that is a formula."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from configs import stableavatar
from kavatar_jax.cascade.denoise import step_weights
from kavatar_jax.cascade.hear import plan_latents, spans_of_windows
from kavatar_jax.config import SamplingConfig, set_fields
from kavatar_jax.diffusion import guidance
from kavatar_jax.diffusion.flow import TRAIN_STEPS, sampling_sigmas, training_sigmas
from kavatar_jax.diffusion.solver import euler
from kavatar_jax.diffusion.windows import Windows, fuse, overlap_ramp
from kavatar_jax.models import wav2vec2
from tools.reference.synthetic_weights import Fixture

FIXTURES = ("sampler",)


def run(fixture: Fixture) -> Iterator[tuple[str, Any]]:
    for name in fixture.meta["outputs"]:
        kind, _, what = name.partition("/")
        if kind == "schedule":
            yield name, _schedule(what)
        elif kind == "overlap_weights":
            scheme, overlap = what.split("_")
            yield name, overlap_ramp(int(overlap), scheme)
        elif kind == "windows":
            yield name, _window_rows(fixture.expected(name))
        else:
            yield name, _sample(fixture, kind, round_state=what == "latents_bf16_store")


def _sampling(frames: int, overlap: int, **fields) -> SamplingConfig:
    sampling = stableavatar.released().sampling
    fields |= {"window_frames": frames, "overlap": overlap}
    return set_fields(sampling, [f"{name}={value!r}" for name, value in fields.items()])


def _schedule(what: str) -> np.ndarray:
    kind, _, count = what.rpartition("_")
    if kind.startswith("training"):
        sigmas = training_sigmas(5.0)
        return sigmas * TRAIN_STEPS if "timesteps" in kind else sigmas
    sigmas = sampling_sigmas(int(count), 5.0, double_shift=True)
    return sigmas[:-1] * TRAIN_STEPS if kind == "timesteps" else sigmas


def _windows(samples: int, fps: int, sampling: SamplingConfig) -> Windows:
    _, total = plan_latents(samples, fps, sampling)
    length = sampling.window_latents
    windows = Windows(total=total, length=length, stride=length - sampling.overlap, slots=1, short_end=True)
    return Windows(total=total, length=length, stride=windows.stride, slots=windows.count, short_end=True)


def _window_rows(listed: np.ndarray) -> np.ndarray:
    """A row per window; for lengths at which the reference runs none or never ends, the row that says so."""
    rows = []
    for frames, overlap, fps, samples in dict.fromkeys(tuple(map(int, row[:4])) for row in listed):
        sampling = _sampling(frames, overlap)
        windows = _windows(samples, fps, sampling)
        head = (frames, overlap, fps, samples, windows.total)
        if windows.total <= windows.length:
            rows.append((*head, 0 if windows.total < windows.length else -1, -1, -1, -1, -1))
            continue
        spans = spans_of_windows(windows, samples, fps, sampling)
        for start, valid, span in zip(windows.starts, windows.valid, spans, strict=True):
            rows.append((*head, windows.count, start, start + valid, *span))
    return np.array(rows)


def _sample(fixture: Fixture, name: str, *, round_state: bool) -> np.ndarray:
    case, arrays = fixture.meta["cases"][name], fixture.inputs(name)
    sampling = _sampling(
        case["clip_frames"], case["overlap"], fusion=case["scheme"], steps=case["steps"],
        text_scale=case["text_scale"], audio_scale=case["audio_scale"],
    )  # fmt: skip
    windows = _windows(case["samples"], 25, sampling)
    spans = spans_of_windows(windows, case["samples"], 25, sampling)
    branches = guidance.text_and_audio(sampling.text_scale, sampling.audio_scale)
    sigmas = sampling_sigmas(sampling.steps, sampling.shift, double_shift=sampling.double_shift)
    noise = np.moveaxis(arrays["noise"][0], 0, -1)
    noise = np.pad(noise, ((0, windows.padded_total - len(noise)), (0, 0), (0, 0), (0, 0)))
    image = jnp.asarray(np.moveaxis(arrays["image_latent"][0], 0, -1))
    heard = [_features(arrays["waveform"][first:last]) for first, last in spans]
    x, later = jnp.asarray(windows.split(noise)), step_weights(windows, sampling)
    for i in range(sampling.steps):
        velocities = [
            jnp.stack(
                [_velocity(x[k], image, heard[k], int(windows.valid[k]), sigmas[i], branch) for k in range(len(x))]
            )
            for branch in branches
        ]
        x = euler(x, guidance.combine(jnp.stack(velocities), branches), sigmas[i], sigmas[i + 1])
        x = fuse(x, later[min(i, 1)], windows.stride)
        x = x.astype(jnp.bfloat16).astype(jnp.float32) if round_state else x
    return np.moveaxis(windows.join(x), -1, 0)[None]


def _features(samples: np.ndarray) -> tuple[float, float, int]:
    """Mean over tokens of the stand-in's two speech features, and how many tokens there are."""
    samples = wav2vec2.normalise(samples)
    tokens = wav2vec2.token_count(len(samples), stableavatar.config().speech)
    pieces = np.stack([samples[320 * j : 320 * j + 400] for j in range(tokens)]).astype(np.float64)
    return float(pieces.mean()), float(np.abs(pieces).mean()), tokens


def _velocity(x, image, heard: tuple[float, float, int], frames: int, sigma, branch: guidance.Branch):
    """The formula in the fixture's meta.json, on the real frames of one window (T, h, w, C)."""
    frame = jnp.arange(x.shape[0])
    place = (frame / frames)[:, None, None, None]
    mean, loudness, tokens = heard if branch.heard else (0.0, 0.0, 0)
    audio = 40 * mean * (1 - place) + loudness * place + 0.002 * tokens
    before = x[(frame - 1) % frames]
    mask = (frame == 0).astype(x.dtype)[:, None, None, None]
    text = 0.3 * jnp.roll(x, 1, axis=1) + 0.1 * audio * x if branch.positive else 0.0
    return (
        0.8 * x - 0.15 * jnp.roll(x, 1, axis=2) + 0.1 * before - 0.3 * jnp.tanh(x) * sigma
        - 0.4 * image - 0.2 * mask + 0.25 * audio + text
    )  # fmt: skip
