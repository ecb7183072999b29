"""Video files: (H, W, 3) uint8 frames out to a file as they come, with sound, and back in; probing and contact sheets.

All of it through the ffmpeg binary that imageio-ffmpeg brings, so nothing has to be installed on the system.
"""

import contextlib
import io
import itertools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import numpy as np
import soundfile

from kavatar_jax.media import audio
from kavatar_jax.types import SAMPLE_RATE, Speech

SUFFIXES = (".mp4", ".mov", ".mkv")  # containers that hold H.264 and AAC


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """width, height: pixels, after rotation. fps: average. frames: counted. seconds: frames / fps."""

    width: int
    height: int
    fps: float
    frames: int
    seconds: float
    has_audio: bool


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    *,
    fps: float,
    speech: Speech | None,
    seconds: float | None = None,
    quality: int = 18,
) -> None:
    """Encode (H, W, 3) uint8 RGB frames as H.264 (yuv420p, BT.709), with the speech as AAC.

    The frames go into a pipe as the iterable yields them, so memory does not grow with the length. The sound is the
    speech's own file at its own quality, else its samples; it is cut or padded with silence to the length of the
    picture. seconds: take only the frames that begin before this time, whatever more the iterable has. quality: x264's
    constant rate factor, lower is better and larger; 18 is visually lossless.

    The file appears under its name only when it is complete; after an error or Ctrl-C nothing is left.
    Errors: ValueError for what check_writable refuses, a missing speech file, odd sides and no frames at all;
    OSError with ffmpeg's last words if encoding fails, such as on a full disk.
    """
    path = check_writable(path)
    if speech is not None and speech.path is not None and not speech.path.is_file():
        raise ValueError(f"audio {speech.path}: the file has gone since it was loaded")
    if seconds is not None:
        frames = itertools.islice(frames, math.ceil(seconds * fps - 1e-6))
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"video {path}: there are no frames to write")
    whole, mute = (path.with_name(f".{path.stem}.{os.getpid()}.{word}{path.suffix}") for word in ("partial", "mute"))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            sound = None if speech is None else _sound_file(speech, Path(scratch))
            command = _encode_command(first.shape, whole if sound is None else mute, fps, quality)
            count = _feed(command, itertools.chain([first], frames), path)
            if sound is not None:  # how long it is to be is known only now
                _feed(_mux_command(mute, sound, whole, count / fps), (), path)
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)
        mute.unlink(missing_ok=True)


def remove_leftovers(folder: Path, stems: Collection[str]) -> None:
    """Remove what `write_video` left in a folder when it was killed over videos of these names without their suffix.

    Not while another process is writing one of them.
    """
    for file in folder.iterdir():
        found = re.fullmatch(r"\.(.+)\.\d+\.(partial|mute)\.\w+", file.name)
        if found and found[1] in stems:
            file.unlink(missing_ok=True)


def check_writable(path: str | Path) -> Path:
    """The path with ~ expanded, once a video can be written there: call it before hours of work.

    Errors: ValueError if the folder is missing or not writable, the path is a folder, or the suffix is unknown.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"video {path}: is a folder; add a file name such as {path / 'out.mp4'}")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"video {path}: the name must end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"video {path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"video {path}: the folder {path.parent} is not writable")
    return path


def probe(path: str | Path) -> VideoInfo:
    """What is in a video file. Decodes it once to count, about a second for a minute of 480p.

    Errors: ValueError if the file is missing or is not a video.
    """
    command = [*_input(path), "-map", "0:v:0", "-fps_mode", "passthrough", "-f", "null", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    log = done.stderr.decode(errors="replace")
    source, _, target = log.partition("Output #0")
    stream = re.search(r"Stream .*Video: .*?\b(\d+)x(\d+)\b.*?([\d.]+)(k?) fps", target)
    counts = re.findall(r"frame= *(\d+)", target)
    if done.returncode != 0 or not stream or not counts:
        raise ValueError(f"video {path}: not a video that ffmpeg can read ({last_words(io.BytesIO(done.stderr))})")
    width, height, rate, thousand = stream.groups()
    fps, count = float(rate) * (1000 if thousand else 1), int(counts[-1])
    has_audio = re.search(r"Stream .*Audio: ", source) is not None
    return VideoInfo(
        width=int(width), height=int(height), fps=fps, frames=count, seconds=count / fps, has_audio=has_audio
    )


def read_frames(path: str | Path, *, fps: float | None = None) -> Iterator[np.ndarray]:
    """Yield the frames, (H, W, 3) uint8 RGB, upright, decoded as they are asked for.

    fps: None yields every stored frame once; a number repeats and drops frames to that constant rate.
    Errors: ValueError if the file is missing and, once frames are asked for, if it is not a video or is broken.
    """
    rate = "" if fps is None else f"fps={_rational(fps)},"
    command = [*_input(path), "-v", "error", "-map", "0:v:0", "-fps_mode", "passthrough"]
    command += ["-vf", f"{rate}scale=out_range=pc:{_SCALE}", "-pix_fmt", "rgb24"]
    # A ppm header in front of each frame says its size, which saves asking for it beforehand.
    return _decode([*command, "-c:v", "ppm", "-f", "image2pipe", "pipe:1"], path)


def contact_sheet(frames: Iterable[np.ndarray], *, columns: int) -> np.ndarray:
    """Lay frames of one size, (h, w, 3) uint8, out left to right and down: (rows * h, columns * w, 3), black behind."""
    tiles = list(frames)
    if not tiles:
        raise ValueError("a contact sheet needs at least one frame")
    columns = min(columns, len(tiles))
    height, width, channels = tiles[0].shape
    rows = -(-len(tiles) // columns)
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[: len(tiles)] = np.stack(tiles)
    return sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, -1, channels)


def ffmpeg() -> list[str]:
    """The beginning of every command that writes."""
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-v", "error", "-nostats", "-y"]


def raw_options(shape: tuple[int, ...], fps: float) -> list[str]:
    """Frames (H, W, 3) uint8 that ffmpeg reads from standard input; ValueError for odd sides."""
    height, width = shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"video size {width}x{height} is odd; H.264 with 4:2:0 colour needs even sides")
    return ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(_rational(fps)), "-i", "pipe:0"]


def colour_options() -> list[str]:
    """RGB to yuv420p as BT.709, and said so."""
    tags = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    return ["-vf", f"scale=out_color_matrix=bt709:out_range=tv:{_SCALE},format=yuv420p,{tags}"]


def last_words(log: IO[bytes]) -> str:
    """The end of what ffmpeg said."""
    log.seek(0)
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read().decode(errors="replace")) if line.strip()]
    return "; ".join(lines[-3:]) or "it gave no reason"


# swscale's defaults are faster and coarser: dark by one level, colour edges shifted.
_SCALE = "flags=accurate_rnd+full_chroma_int+full_chroma_inp+bicubic"
_WEB = ("-movflags", "+faststart")  # the index first, so that a browser can start before it has the whole file


def _input(path: str | Path) -> list[str]:
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"video {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-i", f"file:{path}"]


def _sound_file(speech: Speech, scratch: Path) -> Path:
    if speech.path is not None:
        return speech.path
    soundfile.write(scratch / "speech.wav", speech.samples, SAMPLE_RATE, subtype="FLOAT")
    return scratch / "speech.wav"


def _encode_command(shape: tuple[int, ...], target: Path, fps: float, quality: int) -> list[str]:
    picture = [*raw_options(shape, fps), *colour_options()]
    return [*ffmpeg(), *picture, "-c:v", "libx264", "-crf", str(quality), *_WEB, f"file:{target}"]


def _mux_command(mute: Path, sound: Path, target: Path, seconds: float) -> list[str]:
    """The picture as it is, and the sound cut or padded to its length."""
    inputs = ["-i", f"file:{mute}", "-i", f"file:{sound}", "-map", "0:v:0", "-map", "1:a:0"]
    as_long = ["-af", f"{audio.FROM_ZERO},apad,atrim=end={seconds:.6f}"]
    return [*ffmpeg(), *inputs, "-c:v", "copy", *as_long, "-c:a", "aac", "-b:a", "192k", *_WEB, f"file:{target}"]


def _feed(command: list[str], frames: Iterable[np.ndarray], path: Path) -> int:
    """Run ffmpeg over the frames; how many they were. Its log goes to a file: a pipe that nobody reads would block."""
    shape, count = None, 0
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log) as encoder:
        assert encoder.stdin is not None
        try:
            for frame in frames:
                shape = shape or frame.shape
                assert frame.dtype == np.uint8 and frame.shape == shape and shape[2] == 3, (
                    frame.dtype,
                    frame.shape,
                    shape,
                )
                if not _written(encoder.stdin, np.ascontiguousarray(frame)):
                    break
                count += 1
        except BaseException:
            encoder.kill()
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):
                encoder.stdin.close()
        if encoder.wait() != 0:
            raise OSError(f"video {path}: ffmpeg could not write it ({last_words(log)})")
    return count


def _written(pipe: IO[bytes], frame: np.ndarray) -> bool:
    """False if the encoder has given up; its log says why."""
    try:
        pipe.write(frame.data)
    except BrokenPipeError:
        return False
    return True


def _decode(command: list[str], path: str | Path) -> Iterator[np.ndarray]:
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as decoder:
        assert decoder.stdout is not None
        count = 0
        try:
            while decoder.stdout.readline() == b"P6\n":
                width, height = map(int, decoder.stdout.readline().split())
                decoder.stdout.readline()  # the largest value, 255
                pixels = decoder.stdout.read(width * height * 3)
                if len(pixels) < width * height * 3:
                    break
                count += 1
                yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
        except BaseException:  # the reader has had enough
            decoder.kill()
            raise
        if decoder.wait() != 0 or not count:
            raise ValueError(f"video {path}: ffmpeg cannot read it beyond frame {count} ({last_words(log)})")


def _rational(fps: float) -> Fraction:
    """The frame rate as containers store it, 30000/1001 included."""
    if not fps > 0:
        raise ValueError(f"fps {fps} must be positive")
    return Fraction(fps).limit_denominator(1001)
