"""Sound files to numpy: any recording in, mono float32 at 16 kHz out, with the contours a director listens to.

In: a path to anything ffmpeg decodes, a video's sound track included. Out: `Speech`, and from it pauses in seconds,
level in dB and pitch in Hz. Value i of a contour describes the span [i * hop, (i + 1) * hop) seconds, so that with
hop = 1 / fps value i belongs to video frame i.
"""

import functools
import io
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import soundfile
import soxr
from scipy import ndimage, signal

from kavatar_jax.types import SAMPLE_RATE, Speech

# Sound that starts late in its container is padded to time zero, in what the models hear and in what is muxed alike.
FROM_ZERO = "aresample=async=1:first_pts=0"

_HOP = 0.01  # seconds between the frames in which pauses are measured
_FLOOR_DB = -120.0  # what digital silence counts as
_STRETCH = 30  # seconds worked on at once, so that an hour needs little more memory than itself


def load_speech(path: str | Path) -> Speech:
    """The recording as mono float32 at 16 kHz.

    One decoder, ffmpeg, for every format, because ffmpeg also muxes the sound into the video and two decoders need not
    agree on where a compressed file begins. The rest is the recipe of librosa.load, which the reference
    implementations use: the mean of the channels, then soxr at high quality. Peaks above 1, which lossy formats
    make, are scaled down.

    Errors: ValueError if the file is missing, is not sound, has no samples, or has samples that are not numbers.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"audio {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    channels, rate = _decode(path)
    if not np.isfinite(channels).all():
        raise ValueError(f"audio {path}: some samples are NaN or infinite; export the recording again")
    samples = soxr.resample(channels.mean(axis=1), rate, SAMPLE_RATE, quality="HQ")
    if not len(samples):
        raise ValueError(f"audio {path}: the recording is empty ({len(channels)} samples)")
    return Speech(samples=samples / max(1.0, float(np.abs(samples).max())), path=path)


def decode_command(path: Path) -> list[str]:
    """What makes a float wav of any recording and writes it to a pipe."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-i", f"file:{path}", "-map", "0:a:0"]
    return [*command, "-af", FROM_ZERO, "-c:a", "pcm_f32le", "-f", "wav", "pipe:1"]


def is_silent(speech: Speech) -> bool:
    """Whether nobody speaks: all of it under -60 dBFS, or a steady noise under -45 dBFS. Such a file is still valid."""
    return _level_and_floor(_energy_above_hum(speech)) is None


def find_pauses(speech: Speech, *, min_seconds: float = 0.2) -> list[tuple[float, float]]:
    """Spans of silence of at least min_seconds, as (start, end) in seconds, in order and not touching.

    Silence is relative: 35 dB under this recording's loud speech, or 8 dB above its noise floor where that is higher,
    yet at least 15 dB under the speech, so that music or noise that never stops has no pauses. A second threshold 5 dB
    up keeps a wavering level from ending a pause, and so does a click. A recording without speech is one pause.
    """
    energy = _energy_above_hum(speech)
    found = _level_and_floor(energy)
    if found is None:
        spans = [(0, len(energy))]
    else:
        level, floor = found
        spans = _quiet_spans(energy, min(max(level - 35, floor + 8), level - 15), margin=5, click=round(0.08 / _HOP))
    seconds = [(a * _HOP, min(b * _HOP, speech.seconds)) for a, b in spans]
    return [(a, b) for a, b in seconds if b - a >= min_seconds]


def energy_contour(speech: Speech, *, hop: float) -> np.ndarray:
    """(n,) float32: RMS level in dBFS every `hop` seconds over windows of max(hop, 30 ms); digital silence is -120."""
    return _energy(speech.samples, hop)


def pitch_contour(speech: Speech, *, hop: float) -> np.ndarray:
    """(n,) float32: fundamental frequency of the voice in Hz, 65 to 500, every `hop` seconds; nan where unvoiced.

    YIN (de Cheveigne and Kawahara 2002, steps 2 to 5) at 8 kHz: the first lag whose normalised difference dips under
    0.15, else the deepest dip; voiced if that is under 0.35 and the level is within 35 dB of the loud speech.
    """
    energy = _energy(speech.samples, hop)
    found = _level_and_floor(_energy_above_hum(speech))
    pitch = np.full(len(energy), np.nan, np.float32)
    if found is None:
        return pitch
    samples = soxr.resample(speech.samples, SAMPLE_RATE, _YIN_RATE)
    padded = np.pad(samples, _YIN_WINDOW + _YIN_LAGS[1])
    centres = np.round((np.arange(len(energy)) + 0.5) * hop * _YIN_RATE).astype(int) + _YIN_WINDOW + _YIN_LAGS[1]
    loud = np.flatnonzero(energy > found[0] - 35)
    for block in np.array_split(loud, len(loud) // 4096 + 1):  # some tens of MB at a time
        first = centres[block] - (_YIN_WINDOW + _YIN_LAGS[1]) // 2
        pitch[block] = _yin(padded[first[:, None] + np.arange(_YIN_WINDOW + _YIN_LAGS[1])])
    return pitch


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """(n, channels) float32 and the sample rate, both untouched: a float wav from ffmpeg through a pipe."""
    done = subprocess.run(decode_command(path), capture_output=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        if any("matches no streams" in line for line in lines):
            raise ValueError(f"audio {path}: the file has no sound track")
        raise ValueError(f"audio {path}: not a sound file that ffmpeg can read ({lines[-1] if lines else 'no reason'})")
    return soundfile.read(io.BytesIO(done.stdout), dtype="float32", always_2d=True)


def _energy(samples: np.ndarray, hop: float) -> np.ndarray:
    """(n,) float32 dBFS, from running sums, so that the cost does not depend on the window."""
    centres = (np.arange(int(np.ceil(len(samples) / (hop * SAMPLE_RATE) - 1e-6))) + 0.5) * hop
    half = max(hop, 0.03) / 2
    first, last = (
        np.clip(np.round(t * SAMPLE_RATE), 0, len(samples)).astype(int) for t in (centres - half, centres + half)
    )
    power, count = np.empty(len(centres)), max(1, int(_STRETCH / hop))
    for start in range(0, len(centres), count):
        part, begin = slice(start, start + count), first[start]
        sums = np.concatenate([[0.0], np.cumsum(np.square(samples[begin : last[part][-1]], dtype=np.float64))])
        power[part] = (sums[last[part] - begin] - sums[first[part] - begin]) / np.maximum(last[part] - first[part], 1)
    return (10 * np.log10(np.maximum(power, 10 ** (_FLOOR_DB / 10)))).astype(np.float32)


def _energy_above_hum(speech: Speech) -> np.ndarray:
    """(n,) float32 dBFS every _HOP seconds, above 100 Hz: mains hum and rumble are not speech."""
    sections, heard = _high_pass(), np.empty(len(speech.samples), np.float32)
    state = np.zeros((len(sections), 2))
    for start in range(0, len(heard), _STRETCH * SAMPLE_RATE):
        part = slice(start, start + _STRETCH * SAMPLE_RATE)
        heard[part], state = signal.sosfilt(sections, speech.samples[part], zi=state)
    return _energy(heard, _HOP)


@functools.cache
def _high_pass() -> np.ndarray:
    return np.asarray(signal.butter(2, 100, "highpass", fs=SAMPLE_RATE, output="sos"))


def _level_and_floor(energy: np.ndarray) -> tuple[float, float] | None:
    """Level of the loud speech and of the noise between it in dBFS; None where there is no speech.

    The level is a percentile of the frames that can be speech, so that one word in a long silence counts. The noise is
    what stays within 8 dB for 250 ms, well under the speech: digital silence around a noisy recording does not hide it,
    and a recording without noise has none, however few its pauses.
    """
    peak = energy.max(initial=_FLOOR_DB)
    if peak < -60:
        return None
    level = float(np.percentile(energy[energy > peak - 40], 90))
    if level < -45 and level - np.percentile(energy[energy > level - 60], 5) < 12:
        return None
    steady = ndimage.maximum_filter1d(energy, 25) - ndimage.minimum_filter1d(energy, 25) < 8
    noise = energy[steady & (energy > level - 60) & (energy < level - 15)]
    return level, float(np.percentile(noise, 25)) if len(noise) > 20 else level - 60


def _quiet_spans(energy: np.ndarray, low: float, *, margin: float, click: int) -> list[tuple[int, int]]:
    """Runs of frames under low + margin, each cut to its first and last frame under low; gaps up to `click` closed."""
    edges = np.flatnonzero(np.diff(energy < low + margin, prepend=False, append=False))
    spans: list[tuple[int, int]] = []
    for start, end in edges.reshape(-1, 2):
        quiet = start + np.flatnonzero(energy[start:end] < low)
        if not len(quiet):
            continue
        first, last = int(quiet[0]), int(quiet[-1]) + 1
        if spans and first - spans[-1][1] <= click:
            first = spans.pop()[0]
        spans.append((first, last))
    return spans


_YIN_RATE = 8000
_YIN_WINDOW = 256  # samples compared at every lag: 32 ms
_YIN_LAGS = (_YIN_RATE // 500, _YIN_RATE // 65 + 1)


def _yin(frames: np.ndarray) -> np.ndarray:
    """(n, _YIN_WINDOW + longest lag) -> (n,) Hz, nan where no lag fits."""
    shortest, longest = _YIN_LAGS
    spectrum = np.fft.rfft(frames, 512)
    head = np.fft.rfft(frames[:, :_YIN_WINDOW], 512)
    correlation = np.fft.irfft(spectrum * head.conj(), 512)[:, : longest + 1]
    sums = np.pad(np.cumsum(np.square(frames, dtype=np.float64), axis=1), ((0, 0), (1, 0)))
    power = sums[:, _YIN_WINDOW : _YIN_WINDOW + longest + 1] - sums[:, : longest + 1]
    difference = np.maximum(power[:, :1] + power - 2 * correlation, 0)[:, 1:]
    mean = np.cumsum(difference, axis=1) / np.arange(1, longest + 1)
    normalised = difference / np.maximum(mean, 1e-12)  # column k is lag k + 1

    inner = normalised[:, shortest - 1 : -1]
    dips = (inner <= normalised[:, shortest - 2 : -2]) & (inner < normalised[:, shortest:])
    good = dips & (inner < 0.15)
    deepest = np.where(dips, inner, np.inf).argmin(axis=1)
    column = np.where(good.any(axis=1), good.argmax(axis=1), deepest) + shortest - 1
    row = np.arange(len(frames))
    left, centre, right = (normalised[row, column + k] for k in (-1, 0, 1))
    bend = left - 2 * centre + right
    lag = column + 1 + np.where(bend > 1e-9, 0.5 * (left - right) / np.maximum(bend, 1e-9), 0.0)
    return np.where(dips.any(axis=1) & (centre < 0.35), _YIN_RATE / lag, np.nan)
