"""Speech features of every window, computed once: which samples a window hears, and which of their features a frame reads.

"exact": a window of F frames hears the samples of exactly those frames, padded with silence past the end of the recording,
so that latent frame i always reads its own four frames. "released": StableAvatar's spans, 84 frames for a window of 81 and
whatever is left for the last one, cut into as many slices all the same. An encoder with a memory hears what came before a
window as well, silence where that is before the beginning; never what comes after, which in a stream has not been said yet.
"""

import numpy as np

from kavatar_jax.config import Config, SamplingConfig
from kavatar_jax.diffusion.windows import Windows
from kavatar_jax.models.audio_adapter import ABSENT, slice_table
from kavatar_jax.models.components import model_of
from kavatar_jax.parallel.programs import program
from kavatar_jax.types import SAMPLE_RATE, Params

WINDOWS_AT_ONCE = 4  # speech encoder batch; a small one, so that memory does not grow with the recording


def plan_latents(samples: int, fps: int, sampling: SamplingConfig) -> tuple[int, int]:
    """(video frames, latent frames) for a recording: every frame of it, or as released up to three fewer."""
    if sampling.indexing == "released":
        latents = max(samples // (SAMPLE_RATE // fps) - 1, 0) // 4 + 1
        return 4 * (latents - 1) + 1, latents
    frames = max(1, round(samples * fps / SAMPLE_RATE))
    return frames, max(2, -(-(frames - 1) // 4) + 1)  # at least two, so that there is a last frame to give


def spans_of_windows(windows: Windows, samples: int, fps: int, sampling: SamplingConfig) -> np.ndarray:
    """First and last (exclusive) sample of each slot: (slots, 2); empty slots hear nothing."""
    first_frames = 4 * windows.starts
    if sampling.indexing == "exact":
        return spans_of_frames(first_frames, fps, sampling)
    step = SAMPLE_RATE // fps
    ends = np.where(np.arange(windows.slots) == windows.count - 1, samples, step * (first_frames + 4 * windows.length))
    spans = np.stack([step * first_frames, ends], axis=1)
    spans[windows.count :] = 0
    return spans


def spans_of_frames(first_frames: np.ndarray, fps: int, sampling: SamplingConfig) -> np.ndarray:
    """The samples of one window of frames from each of these frames on: (n, 2)."""
    starts = np.round(first_frames * SAMPLE_RATE / fps).astype(int)
    return np.stack([starts, starts + round(sampling.window_frames * SAMPLE_RATE / fps)], axis=1)


def hear(speech: np.ndarray, spans: np.ndarray, params: Params, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Features (W, L, D) float32 and slices (W, T, A) int32 of every span of samples.

    speech: with the config.memory_samples samples before the first span, as far as there are any.
    """
    lengths = spans[:, 1] - spans[:, 0]
    encoder = model_of("speech", config.speech)
    tokens = [encoder.token_count(int(length), config.speech) if length else 0 for length in lengths]
    tables = [slice_table(count, config.sampling.window_frames) if count > 0 else None for count in tokens]
    width = max(table.shape[1] for table in tables if table is not None)
    features = np.zeros((len(spans), max(tokens), config.speech.width), np.float32)
    slices = np.full((len(spans), config.sampling.window_latents, width), ABSENT, np.int32)
    slices[:, :, 0] = 0  # something to attend to, also in an empty slot
    for length in sorted(set(lengths) - {0}):
        where = np.flatnonzero(lengths == length)
        for start in range(0, len(where), WINDOWS_AT_ONCE):
            chosen = where[start : start + WINDOWS_AT_ONCE]
            waves = np.zeros((min(WINDOWS_AT_ONCE, len(where)), config.memory_samples + length), np.float32)
            for row, window in zip(waves, chosen, strict=False):
                first = spans[window, 0] - config.memory_samples
                heard = speech[max(first, 0) : spans[window, 1]]
                row[max(-first, 0) :][: len(heard)] = encoder.normalise(heard) if len(heard) else heard
            features[chosen, : tokens[chosen[0]]] = _listen(config.speech, params, waves)[: len(chosen)]
        for window in where:
            table = tables[window]
            assert table is not None
            slices[window, :, : table.shape[1]] = table
    return features, slices


@program(static_argnums=0)
def _listen(config, params, waves):
    return model_of("speech", config).listen(params, waves, config)
