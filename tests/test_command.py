"""`kavatar generate` as typed: every bad input is one clear line and exit 2, good ones make a video with sound."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner

from kavatar_jax import __main__
from kavatar_jax.cascade import command
from kavatar_jax.cascade.weights import SOURCES
from kavatar_jax.config import load_config, set_fields
from kavatar_jax.media.video import probe, read_frames
from kavatar_jax.types import SAMPLE_RATE


@pytest.fixture
def files(tmp_path):
    time = np.arange(int(1.1 * SAMPLE_RATE)) / SAMPLE_RATE
    soundfile.write(tmp_path / "speech.wav", 0.3 * np.sin(2 * np.pi * 180 * time), SAMPLE_RATE)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "portrait.png")
    return tmp_path


def kavatar(files, **options):
    options = {
        "portrait": files / "portrait.png", "speech": files / "speech.wav", "out": files / "video.mp4",
        "config": "demo:tiny",
    } | options  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return CliRunner().invoke(__main__.app, ["generate", *words])


@pytest.mark.parametrize("mode", ["cascade", "single"])
def test_a_video_with_sound_and_its_story(files, mode):
    result = kavatar(files, mode=mode, instruction="she smiles", storyline_out=files / "plan.json")
    assert result.exit_code == 0, result.output
    info = probe(files / "video.mp4")
    assert (info.width, info.height, info.frames, info.has_audio) == (48, 32, round(1.1 * 25), True)
    told = json.loads((files / "video.json").read_text())
    assert told["config"]["sampling"]["steps"] == 2 and told["versions"]["jax"]
    assert told["storyline"]["shots"] and "she smiles" in told["storyline"]["shots"][0]["prompt"]
    assert told["seconds"]["total"] > 0 and told["frames"] == info.frames
    assert json.loads((files / "plan.json").read_text())["shots"] == told["storyline"]["shots"]


def test_a_given_storyline_is_followed(files):
    shots = [{"start": 0, "end": 0.6, "prompt": "first"}, {"start": 0.6, "end": 1.1, "prompt": "second"}]
    (files / "plan.json").write_text(json.dumps({"summary": "two", "shots": shots}))
    assert kavatar(files, storyline=files / "plan.json", mode="single").exit_code == 0
    told = json.loads((files / "video.json").read_text())
    assert [shot["prompt"] for shot in told["storyline"]["shots"]] == ["first", "second"]


def test_silence_works_and_says_so(files):
    soundfile.write(files / "speech.wav", np.zeros(SAMPLE_RATE // 2), SAMPLE_RATE)
    result = kavatar(files, mode="single")
    assert result.exit_code == 0 and "silent" in result.output
    assert len(list(read_frames(files / "video.mp4"))) == round(0.5 * 25)


def bad(files, **options):
    before = sorted(files.iterdir())
    result = kavatar(files, **options)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("kavatar: ") and result.output.count("\n") == 1, result.output
    assert sorted(files.iterdir()) == before
    return result.output


def test_missing_files(files):
    assert "nobody.png" in bad(files, portrait=files / "nobody.png")
    assert "nothing.wav" in bad(files, speech=files / "nothing.wav")
    assert "no.json" in bad(files, storyline=files / "no.json")
    assert "no such config" in bad(files, config="no such config")


def test_unreadable_files(files):
    (files / "noise.wav").write_bytes(b"\x00\x01" * 500)
    (files / "noise.png").write_bytes(b"\x00\x01" * 500)
    (files / "nil.png").write_bytes(b"")
    soundfile.write(files / "empty.wav", np.zeros(0), SAMPLE_RATE)
    assert "noise.wav" in bad(files, speech=files / "noise.wav")
    assert "empty" in bad(files, speech=files / "empty.wav")
    assert "noise.png" in bad(files, portrait=files / "noise.png")
    assert "nil.png" in bad(files, portrait=files / "nil.png")


def test_sizes_and_numbers(files):
    assert "nearest is 496x512" in bad(files, size="500x512")
    assert "WIDTHxHEIGHT" in bad(files, size="big")
    assert "4n+1" in bad(files, set="sampling.window_frames=80")
    assert "did you mean steps" in bad(files, set="sampling.step=3")
    assert "cascade, single" in bad(files, mode="both")
    assert "at least 1" in bad(files, steps=0)


def test_places_that_cannot_be_written(files):
    assert "does not exist" in bad(files, out=files / "nowhere" / "video.mp4")
    assert ".mp4" in bad(files, out=files / "video.txt")
    assert "does not exist" in bad(files, storyline_out=files / "nowhere" / "plan.json")


def test_weights_directories(files):
    assert "nowhere" in bad(files, weights=files / "nowhere")
    (files / "half" / "vae").mkdir(parents=True)
    message = bad(files, weights=files / "half")
    assert all(source in message for source in SOURCES.values())


def test_ctrl_c_leaves_nothing_behind(files, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "draw", interrupt)
    before = sorted(files.iterdir())
    assert kavatar(files).exit_code == 130
    assert sorted(files.iterdir()) == before


def test_help_needs_no_jax():
    code = "import sys; from kavatar_jax.__main__ import main; sys.argv = ['kavatar', '--help']; main()"
    shown = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in shown.stdout and "jaxlib" not in shown.stderr


def test_every_config_can_be_built():
    variants = [f"stableavatar:{variant}" for variant in ("landscape", "portrait", "released", "fourteen_b")]
    for name in ["demo", "demo:tiny", "stableavatar", *variants]:
        assert load_config(name).name == name


def test_set_fields():
    config = set_fields(load_config("demo"), ["sampling.text_scale=4", "negative_prompt=ugly", "dit.dtype=bfloat16"])
    assert config.sampling.text_scale == 4.0 and isinstance(config.sampling.text_scale, float)
    assert (config.negative_prompt, config.dit.dtype) == ("ugly", "bfloat16")
    config = set_fields(config, ["vae.temporal=[True, False]", "sampling.double_shift=true"])
    assert config.vae.temporal == (True, False) and config.sampling.double_shift is True
    for wrong in ("fps", "fps=high", "sampling=3", "dit.depth.x=1"):
        with pytest.raises(ValueError, match="--set"):
            set_fields(config, [wrong])
