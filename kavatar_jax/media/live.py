"""Sound that is still being recorded, and a video that can be watched while it is being made.

In: raw samples from a pipe, a file of any kind, or one that grows -> mono float32 at 16 kHz, in pieces as they come. Out:
moments, each a frame and the sound of its time, to a fragmented MP4, or the frames alone as raw RGB. Nothing grows with
the length.
"""

import contextlib
import itertools
import os
import queue
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import soxr

from kavatar_jax.media.audio import decode_command
from kavatar_jax.media.video import colour_options, ffmpeg, last_words, raw_options
from kavatar_jax.types import SAMPLE_RATE

PIECE = 1 << 14  # bytes read at once: half a second of 16-bit samples at most
PATIENCE = 0.05  # seconds between two looks at a file that grows
FRAGMENT = 0.2  # seconds of video that a player has to wait for

Moment = tuple[np.ndarray, np.ndarray]  # (H, W, 3) uint8, and the (n,) samples heard meanwhile


class Tape:
    """Speech on its way past: iterated over it gives what comes, and it keeps that until the picture has caught up.

    samples: how many have come; over: whether there will be no more.
    """

    def __init__(self, pieces: Iterable[np.ndarray]):
        self.samples, self.over = 0, False
        self._pieces, self._kept, self._taken = iter(pieces), np.zeros(0, np.float32), 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for piece in self._pieces:
            self.samples += len(piece)
            self._kept = np.concatenate([self._kept, piece])
            yield piece
        self.over = True

    def take(self, until: int) -> np.ndarray:
        """The samples from where the last call ended to sample `until`, silence beyond the end; they are forgotten."""
        count = until - self._taken
        taken, self._kept, self._taken = self._kept[:count], self._kept[count:], until
        return np.pad(taken, (0, count - len(taken)))


def read_live(source: Path | None, *, rate: int, follow: float | None) -> Iterator[np.ndarray]:
    """Speech as it comes: (n,) float32 mono at SAMPLE_RATE each.

    source: None for standard input, which is raw 16-bit little-endian mono at `rate` Hz; else a file that ffmpeg reads.
    follow: the file is still growing, a wav or else raw as above, and over when it has not grown for so many seconds.
    As in load_speech, but samples beyond 1 are cut off: what is yet to come cannot be scaled with them.

    Errors: ValueError for a file that is missing or no sound, and a rate or a time that is not positive.
    """
    if rate <= 0:
        raise ValueError(f"--rate {rate} is not a sampling rate; give one in Hz, as in 16000")
    if follow is not None and not follow > 0:
        raise ValueError(f"--follow {follow:g}: give the seconds without growth after which the speech is over")
    if source is None:
        return _samples(_from_stdin(), _Format(rate, 1, "<i2"))
    source = source.expanduser()
    if not source.is_file():
        raise ValueError(f"audio {source}: {'is a folder' if source.is_dir() else 'no such file'}")
    if follow is None:
        return _of_wav(_from_ffmpeg(source), source)
    pieces = _from_growing(source, follow)
    return _of_wav(pieces, source) if source.suffix.lower() == ".wav" else _samples(pieces, _Format(rate, 1, "<i2"))


def write_live(path: Path | None, moments: Iterable[Moment], *, fps: int, quality: int = 18) -> int:
    """Encode moments as they come, so that `path` plays while it grows; None writes raw RGB frames to standard output.

    How many frames were written. Ctrl-C ends the video where it is, and so does an error, which is passed on. OSError
    with ffmpeg's last words if encoding fails, or if nobody reads standard output any more.
    """
    moments = iter(moments)
    first = next(moments, None)
    if first is None:
        return 0
    moments, count = itertools.chain([first], moments), 0
    opened = _to_stdout() if path is None else _to_fragments(path, first[0].shape, fps, quality)
    with opened as write, contextlib.suppress(KeyboardInterrupt):
        for frame, sound in moments:
            write(np.ascontiguousarray(frame), sound)
            count += 1
    return count


class _Format(NamedTuple):
    rate: int
    channels: int
    dtype: str


def _from_stdin() -> Iterator[bytes]:
    return iter(lambda: sys.stdin.buffer.read1(PIECE), b"")


def _from_growing(path: Path, patience: float) -> Iterator[bytes]:
    with path.open("rb") as file:
        grown = time.monotonic()
        while time.monotonic() - grown < patience:
            if data := file.read(PIECE):
                grown = time.monotonic()
                yield data
            else:
                time.sleep(PATIENCE)


def _from_ffmpeg(path: Path) -> Iterator[bytes]:
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(decode_command(path), stdout=subprocess.PIPE, stderr=log) as decoder,
    ):
        assert decoder.stdout is not None
        try:
            while data := decoder.stdout.read(PIECE):
                yield data
        except BaseException:  # the reader has had enough
            decoder.kill()
            raise
        if decoder.wait() != 0:
            raise ValueError(f"audio {path}: not a sound file that ffmpeg can read ({last_words(log)})")


def _of_wav(pieces: Iterator[bytes], path: Path) -> Iterator[np.ndarray]:
    """The samples of a wav file that comes piece by piece, whatever length its header gives."""
    head = b""
    for piece in pieces:
        head += piece
        if found := _read_header(head, path):
            form, start = found
            yield from _samples(itertools.chain([head[start:]], pieces), form)
            return
    raise ValueError(f"audio {path}: it ended before its first sample")


def _read_header(head: bytes, path: Path) -> tuple[_Format, int] | None:
    """The format and where the samples begin; None if the header is not all there yet."""
    if len(head) < 12:
        return None
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        raise ValueError(f"audio {path}: not a wav file; give raw samples another ending, as in speech.pcm")
    form, place = None, 12
    while place + 8 <= len(head):
        name, size = struct.unpack_from("<4sI", head, place)
        place += 8
        if name == b"data":
            if form is None:
                raise ValueError(f"audio {path}: the wav file has samples before it says what they are")
            return form, place
        if name == b"fmt " and place + size <= len(head):
            kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", head, place)
            if kind == 0xFFFE:  # extensible: the kind proper is further on
                (kind,) = struct.unpack_from("<H", head, place + 24)
            dtype = {(1, 16): "<i2", (3, 32): "<f4"}.get((kind, bits))
            if dtype is None:
                raise ValueError(f"audio {path}: samples of {bits} bits, kind {kind}; record 16 bits or 32-bit floats")
            form = _Format(rate, channels, dtype)
        place += size + size % 2
    return None


def _samples(pieces: Iterator[bytes], form: _Format) -> Iterator[np.ndarray]:
    """Bytes, cut anywhere, to mono float32 at SAMPLE_RATE: the mean of the channels, soxr at high quality."""
    whole = np.dtype(form.dtype).itemsize * form.channels
    scale = 1 / 32768 if form.dtype == "<i2" else 1.0
    resampler = soxr.ResampleStream(form.rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    rest = b""
    for piece in itertools.chain(pieces, [None]):
        rest += piece or b""
        end = len(rest) // whole * whole
        values = np.frombuffer(rest[:end], form.dtype).reshape(-1, form.channels)
        mono = (values.astype(np.float32) * scale).mean(axis=1)
        if not np.isfinite(mono).all():
            raise ValueError("some samples of the speech are NaN or infinite; record it again")
        rest = rest[end:]
        if form.rate != SAMPLE_RATE:
            mono = resampler.resample_chunk(mono, last=piece is None)
        if len(mono):
            yield np.clip(mono, -1, 1)


@contextlib.contextmanager
def _to_stdout():
    def write(frame, _):
        sys.stdout.buffer.write(frame.data)
        sys.stdout.buffer.flush()

    try:
        yield write
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains again when it closes the pipe
        raise OSError("nobody reads standard output any more") from None


@contextlib.contextmanager
def _to_fragments(path: Path, shape: tuple[int, ...], fps: int, quality: int):
    """ffmpeg with two pipes. Each has a writer of its own, since ffmpeg reads now one, now the other."""
    far, near = os.pipe()
    sound = ["-f", "f32le", "-ar", str(SAMPLE_RATE), "-ac", "1", "-i", f"pipe:{far}", "-map", "0:v", "-map", "1:a"]
    video = ["-c:v", "libx264", "-crf", str(quality), "-tune", "zerolatency", "-g", str(fps), *colour_options()]
    fragments = ["-movflags", "+empty_moov+default_base_moof", "-frag_duration", str(round(FRAGMENT * 1e6))]
    command = [*ffmpeg(), *raw_options(shape, fps), *sound, *video, "-c:a", "aac", "-b:a", "96k", *fragments]
    command += ["-flush_packets", "1", f"file:{path}"]
    spoken: queue.SimpleQueue = queue.SimpleQueue()
    with (
        tempfile.TemporaryFile() as log,
        # in a session of its own: Ctrl-C is for us, and ffmpeg is to finish the file
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, pass_fds=[far], start_new_session=True) as encoder,
    ):
        os.close(far)
        speaker = threading.Thread(target=_pour, args=(spoken, os.fdopen(near, "wb")))
        speaker.start()
        assert encoder.stdin is not None

        def write(frame, samples):
            spoken.put(samples)
            encoder.stdin.write(frame.data)  # type: ignore[union-attr]

        try:
            with contextlib.suppress(BrokenPipeError):
                yield write
        finally:
            spoken.put(None)
            with contextlib.suppress(BrokenPipeError):
                encoder.stdin.close()
            speaker.join()
            if encoder.wait() != 0:
                raise OSError(f"video {path}: ffmpeg could not write it ({last_words(log)})")


def _pour(spoken: queue.SimpleQueue, pipe: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError), pipe:
        while (samples := spoken.get()) is not None:
            pipe.write(samples.astype("<f4").data)
            pipe.flush()
