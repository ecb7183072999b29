"""The weights that come with the package: a puppet they have not seen says what it is told to, and stays itself."""

import numpy as np
import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner

from configs.demo import DRIVEN
from kavatar_jax import __main__
from kavatar_jax.cascade import command
from kavatar_jax.cascade.weights import check_complete
from kavatar_jax.config import load_config
from kavatar_jax.media.video import read_frames
from kavatar_jax.puppets import judge
from kavatar_jax.puppets.measure import read
from kavatar_jax.types import SAMPLE_RATE
from tools.scenes import synthetic

PUPPETS, SECONDS = 4, 4.0


def generate(*words) -> str:
    result = CliRunner().invoke(__main__.app, ["generate", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def performed(tmp_path_factory):
    """Scenes with what the command made of them, as frames and their reading, and what it said."""
    folder, found = tmp_path_factory.mktemp("demo"), []
    for number in range(PUPPETS):
        scene = synthetic(number, SECONDS, load_config("demo"), driven=DRIVEN)
        Image.fromarray(scene.request.portrait).save(folder / "portrait.png")
        soundfile.write(folder / "speech.wav", scene.request.speech.samples, SAMPLE_RATE)
        words = (
            "--portrait",
            folder / "portrait.png",
            "--speech",
            folder / "speech.wav",
            "--out",
            folder / "video.mp4",
        )
        said = generate(*words, "--mode", "single", "--instruction", scene.request.instruction)
        frames = np.stack(list(read_frames(folder / "video.mp4")))
        assert len(frames) == round(25 * SECONDS)
        found.append((scene, read(frames, scene.request.portrait), said))
    return found


def test_lips_follow_their_own_voice(performed):
    pairs = [(reading.mouth_open, scene.truth) for scene, reading, _ in performed]
    own, others = judge.judge_sync(pairs), judge.judge_sync(judge.swap_truths(pairs))
    assert own.pooled > 0.75 and abs(own.lag) <= 1 and abs(others.pooled) < 0.2, (own, others)


def test_portraits_stay_themselves(performed):
    for scene, reading, _ in performed:
        portrait = scene.request.portrait
        colours = judge.judge_colours(reading, read(portrait[None], portrait))
        assert max(colours.values()) < 6, colours


def test_what_the_weights_know_is_said(performed, tmp_path):
    assert "puppets only" in performed[0][2]
    little = ("--size", "64x64", "--mode", "single", "--steps", "1")
    said = generate("--out", tmp_path / "video.mp4", *little)
    assert "128x128 only" in said and "puppets only" not in said
    generate("--weights", command.DEMO, "--out", tmp_path / "same.mp4", *little)  # the config is told from the weights
    assert (tmp_path / "same.mp4").read_bytes() == (tmp_path / "video.mp4").read_bytes()


def test_they_are_whole_and_small():
    check_complete(command.DEMO)
    files = [file for file in command.DEMO.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6
    assert (command.DEMO / "README.md").is_file()
