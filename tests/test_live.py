"""Live sound and video: bytes cut anywhere, files that grow, an MP4 that plays before it is finished; and the command."""

import struct
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
import soxr
from typer.testing import CliRunner

from kavatar_jax import __main__
from kavatar_jax.director.rules import direct_unheard
from kavatar_jax.media.audio import load_speech
from kavatar_jax.media.live import Tape, read_live, write_live
from kavatar_jax.media.video import probe, read_frames
from kavatar_jax.types import SAMPLE_RATE, Request, Speech

TONE = (0.3 * np.sin(2 * np.pi * 180 * np.arange(int(1.1 * SAMPLE_RATE)) / SAMPLE_RATE)).astype(np.float32)


def pcm(samples) -> bytes:
    return np.round(samples * 32767).astype("<i2").tobytes()


class Pipe:
    """Standard input that gives odd numbers of bytes at a time."""

    def __init__(self, data):
        self.data = data

    def read1(self, count):
        taken, self.data = self.data[: min(count, 333)], self.data[min(count, 333) :]
        return taken


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_raw_samples_from_a_pipe(monkeypatch, rate):
    wave = soxr.resample(TONE, SAMPLE_RATE, rate)
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Pipe(pcm(wave))}))
    pieces = list(read_live(None, rate=rate, follow=None))
    heard = np.concatenate(pieces)
    assert len(pieces) > 10 and heard.dtype == np.float32 and abs(len(heard) - len(TONE)) <= 1
    np.testing.assert_allclose(heard[800:-800], TONE[800:][: len(heard) - 1600], atol=2e-3)


@pytest.mark.parametrize(
    "name, rate, subtype", [("a.wav", 16_000, "PCM_16"), ("b.wav", 24_000, "FLOAT"), ("c.mp3", 44_100, None)]
)
def test_a_recording_is_heard_as_load_speech_hears_it(tmp_path, name, rate, subtype):
    stereo = np.stack([soxr.resample(TONE, SAMPLE_RATE, rate)] * 2, axis=1)
    soundfile.write(tmp_path / name, stereo * [1, 0.5], rate, subtype=subtype)
    heard = np.concatenate(list(read_live(tmp_path / name, rate=16_000, follow=None)))
    np.testing.assert_allclose(heard, load_speech(tmp_path / name).samples, atol=1e-4)


def test_a_file_that_grows(tmp_path):
    path = tmp_path / "speech.wav"
    header = b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    path.write_bytes(header[:20])

    def record():
        rest = header[20:] + b"LIST\x03\0\0\0abc\0" + b"data\xff\xff\xff\xff" + pcm(TONE)
        with path.open("ab", buffering=0) as file:
            for i in range(0, len(rest), 5001):
                file.write(rest[i : i + 5001])
                time.sleep(0.02)

    recorder = threading.Thread(target=record)
    recorder.start()
    heard = np.concatenate(list(read_live(path, rate=8_000, follow=1.0)))  # the rate is the file's own
    recorder.join()
    np.testing.assert_allclose(heard, TONE, atol=1e-4)


def test_a_tape_forgets_what_was_taken():
    tape = Tape(iter(np.split(TONE[:1000], 10)))
    pieces = iter(tape)
    for _ in range(2):
        next(pieces)
    assert tape.samples == 200 and not tape.over
    np.testing.assert_array_equal(tape.take(150), TONE[:150])
    assert len(list(pieces)) == 8 and tape.over and len(tape._kept) == 850
    np.testing.assert_array_equal(tape.take(1100), np.pad(TONE[150:1000], (0, 100)))


def moments(count, then=None):
    for i in range(count):
        frame = np.full((32, 48, 3), 5 * i % 256, np.uint8)
        yield frame, TONE[640 * (i % 25) : 640 * (i % 25) + 640]
    if then is not None:
        then()


def test_a_video_plays_while_it_grows(tmp_path):
    """What has been written before the end is a video with sound of nearly all the frames that were given."""

    def look():
        end = time.monotonic() + 20
        while time.monotonic() < end and (tmp_path / "live.mp4").stat().st_size < 4000:
            time.sleep(0.05)
        time.sleep(0.5)
        (tmp_path / "now.mp4").write_bytes((tmp_path / "live.mp4").read_bytes())

    assert write_live(tmp_path / "live.mp4", moments(75, look), fps=25) == 75
    now, end = probe(tmp_path / "now.mp4"), probe(tmp_path / "live.mp4")
    assert now.frames >= 50 and now.has_audio
    assert end.frames == 75 and end.has_audio and (end.width, end.height, end.fps) == (48, 32, 25)
    shown = [frame.mean() for frame in read_frames(tmp_path / "live.mp4")]
    np.testing.assert_allclose(shown, 5 * np.arange(75) % 256, atol=4)


def test_ctrl_c_leaves_what_was_shown(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    assert write_live(tmp_path / "live.mp4", moments(30, interrupt), fps=25) == 30
    assert probe(tmp_path / "live.mp4").frames == 30


def stream(files, said: bytes, *words):
    words = ("--config", "demo:tiny", *map(str, words))
    return CliRunner().invoke(__main__.app, ["stream", "--out", str(files / "live.mp4"), *words], input=said)


def test_the_command_from_a_pipe(tmp_path):
    result = stream(tmp_path, pcm(TONE), "--instruction", "she smiles")
    assert result.exit_code == 0, result.output
    info = probe(tmp_path / "live.mp4")
    assert (info.width, info.height, info.frames, info.has_audio) == (48, 32, round(1.1 * 25), True)


def test_raw_frames_to_standard_output():
    words = ["stream", "--config", "demo:tiny", "--out", "-"]
    result = CliRunner().invoke(__main__.app, words, input=pcm(TONE[:8000]))
    assert result.exit_code == 0, result.output
    assert len(result.stdout_bytes) == round(0.5 * 25) * 32 * 48 * 3


@pytest.mark.parametrize(
    "words, message",
    [
        (("--speech", "nothing.wav"), "nothing.wav: no such file"),
        (("--rate", "0"), "--rate 0"),
        (("--out", "live.mkv"), ".mp4"),
        (("--follow", "2"), "--speech FILE"),
        (("--set", "sampling.indexing=released"), "needs 'exact'"),
        (("--portrait", "nobody.png"), "nobody.png"),
        ((), "not a single sample"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, words, message):
    result = stream(tmp_path, b"", *words)
    line = [line for line in result.output.splitlines() if line.startswith("kavatar: ")]
    assert result.exit_code == 2 and len(line) == 1 and message in line[0], result.output
    assert not list(tmp_path.iterdir())


def test_an_instruction_for_all_time():
    portrait = np.full((16, 16, 3), 128, np.uint8)
    nothing = Speech(samples=np.zeros(0, np.float32))
    request = Request(portrait=portrait, speech=nothing, instruction="She is happy. At the end she waves.")
    (shot,) = direct_unheard(request).shots
    assert (shot.start, shot.end, shot.emotion) == (0, np.inf, "happy")
    assert request.instruction in shot.prompt and "talking" in shot.prompt and "Now:" not in shot.prompt
