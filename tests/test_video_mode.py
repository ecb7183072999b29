"""`kavatar generate --mode video`: plain Wan2.1 without speech, from words, a first frame, or a first and a last one."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from configs import wan
from kavatar_jax import __main__
from kavatar_jax.cascade.film import draw_film, pictures_wanted, tell_scene
from kavatar_jax.cascade.weights import PLAIN_SOURCES, draw_untrained, load_weights, read_configs
from kavatar_jax.checkpoint.weights import save_component
from kavatar_jax.config import load_config, set_fields
from kavatar_jax.media.text import ByteTokenizer
from kavatar_jax.media.video import probe
from kavatar_jax.media.wear import wear
from kavatar_jax.models.components import COMPONENTS
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.types import Scene, silent

VARIANTS = ("t2v_1b", "t2v_14b", "i2v_480p", "i2v_720p", "flf2v_720p", "tiny", "tiny_i2v", "tiny_flf2v")
TINY = (wan.tiny(), wan.tiny_i2v(), wan.tiny_flf2v())


@pytest.fixture(scope="module")
def weights():
    return {config.name: draw_untrained(config, 0, ByteTokenizer()) for config in TINY}


@pytest.fixture
def files(tmp_path):
    for name in ("first.png", "last.png"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def make_scene(config, instruction="a cat boxes", seed=0):
    rng, shape = np.random.default_rng(1), (config.height, config.width, 3)
    first, last = (rng.integers(0, 256, shape, np.uint8) for _ in range(2))
    wanted = pictures_wanted(config.dit)
    return Scene(
        instruction=instruction, first=first if wanted else None, last=last if wanted == 2 else None, seed=seed
    )


def film(config, weights, scene=None):
    return draw_film(scene or make_scene(config), weights[config.name], config, silent).latents


def kavatar(files, **options):
    options = {"mode": "video", "out": files / "video.mp4", "config": "wan:tiny"} | options
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return CliRunner().invoke(__main__.app, ["generate", *words])


def bad(files, **options):
    before = sorted(files.iterdir())
    result = kavatar(files, **options)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("kavatar: ") and result.output.count("\n") == 1, result.output
    assert sorted(files.iterdir()) == before
    return result.output


def test_configs_of_the_release():
    configs = {name: load_config(f"wan:{name}") for name in VARIANTS}
    assert load_config("wan") == configs["t2v_1b"]
    assert {config.name for config in configs.values()} == {f"wan:{name}" for name in VARIANTS}
    assert [pictures_wanted(config.dit) for config in configs.values()] == [0, 0, 1, 1, 2, 0, 1, 2]
    assert [configs[name].sampling.shift for name in VARIANTS[:5]] == [8, 5, 3, 5, 16]
    assert [configs[name].sampling.steps for name in VARIANTS[:5]] == [50, 50, 40, 40, 50]
    assert all(config.sampling.solver == "unipc" and config.fps == 16 for config in configs.values())
    base = configs["t2v_1b"].negative_prompt
    assert configs["i2v_480p"].negative_prompt.endswith("，" + base)
    assert configs["flf2v_720p"].negative_prompt.endswith(configs["i2v_480p"].negative_prompt)


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_a_video_without_sound_and_how_it_was_made(files, pictures):
    given = {"portrait": files / "first.png", "last_frame": files / "last.png"}
    given = dict(list(given.items())[:pictures])
    config = TINY[pictures].name
    result = kavatar(files, config=config, instruction="a cat boxes", size="32x48", frames=13, steps=1, seed=4, **given)
    assert result.exit_code == 0, result.output
    info = probe(files / "video.mp4")
    assert (info.width, info.height, info.frames, info.fps, info.has_audio) == (32, 48, 13, 16, False)
    told = json.loads((files / "video.json").read_text())
    assert told["config"]["sampling"]["window_frames"] == told["frames"] == 13
    assert (told["order"]["seed"], told["order"]["instruction"]) == (4, "a cat boxes")
    assert told["config"]["negative_prompt"] == TINY[pictures].negative_prompt and "storyline" not in told


@pytest.mark.parametrize("config", TINY, ids=lambda config: config.name)
def test_the_film_follows_seed_words_and_pictures(weights, config):
    scene = make_scene(config)
    latents = film(config, weights, scene)
    assert latents.shape == (3, config.height // 8, config.width // 8, 16) and np.isfinite(latents).all()
    np.testing.assert_array_equal(latents, film(config, weights, scene))
    changes = [{"seed": 1}, {"instruction": "a dog"}]
    changes += [{name: 255 - getattr(scene, name)} for name in ("first", "last") if getattr(scene, name) is not None]
    for change in changes:
        assert np.abs(latents - film(config, weights, dataclasses.replace(scene, **change))).max() > 1e-3, change


@pytest.mark.parametrize("config", TINY[1:], ids=lambda config: config.name)
def test_the_negative_frame_of_a_film_wears_all_of_its_pictures(weights, config):
    scene, guided = make_scene(config), set_fields(config, ["sampling.frame_scale=1.5"])
    pictures = {name: wear(getattr(scene, name)) for name in ("first", "last") if getattr(scene, name) is not None}
    shared = tell_scene(scene, weights[config.name], guided, silent)[2]
    worn = tell_scene(dataclasses.replace(scene, **pictures), weights[config.name], config, silent)[2]
    np.testing.assert_array_equal(shared.worn.image, worn.image)
    np.testing.assert_array_equal(shared.worn.condition, worn.condition)
    assert worn.worn is None and np.abs(film(guided, weights, scene) - film(config, weights, scene)).max() > 1e-3


@pytest.mark.parametrize("solver", ["euler", "dpm++"])
def test_solvers_end_near_one_another(weights, solver):
    config = set_fields(TINY[0], ["sampling.steps=12", "sampling.text_scale=2"])
    usual, other = (film(set_fields(config, [f"sampling.solver={name}"]), weights) for name in ("unipc", solver))
    apart = (usual - other).std() / usual.std()
    assert 0 < apart < 0.3, apart


def test_both_pictures_are_seen_in_order(weights):
    config = TINY[2]
    scene = make_scene(config)
    _, told, shared = tell_scene(scene, weights[config.name], config, silent)
    assert told.speech is None and shared.image.shape == (1, 514, config.image.width)
    mask = np.asarray(shared.condition)[0, :, 0, 0, :4]
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    turned = dataclasses.replace(scene, first=scene.last, last=scene.first)
    other = tell_scene(turned, weights[config.name], config, silent)[2].image
    np.testing.assert_array_equal(shared.image[:, :257], other[:, 257:])


def test_words_are_cleaned_as_released(weights):
    config = TINY[0]
    plain, untidy = (make_scene(config, words) for words in ("a & b", " a  &amp;amp;\n b "))
    np.testing.assert_array_equal(film(config, weights, plain), film(config, weights, untidy))


def test_tokens_over_two_devices_equal_one(weights):
    config = TINY[1]
    one = film(config, weights)
    with jax.set_mesh(make_mesh(data=1, context=-1, devices=jax.devices()[:2])):
        many = film(config, weights)
    np.testing.assert_allclose(many, one, atol=2e-5 * np.abs(one).max())


def test_weights_directories(files, weights):
    config = TINY[0]
    folder = files / "weights"
    with jax.set_mesh(make_mesh(1, devices=jax.devices()[:1])):
        for name in ("dit", "vae", "text"):
            save_component(getattr(weights[config.name], name), getattr(config, name), folder / name)
        assert PLAIN_SOURCES["tokenizer"] in bad(files, config="wan:t2v_1b", weights=folder, instruction="a cat")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "config.json").write_text('{"kind": "bytes"}')
        read = read_configs(folder, dataclasses.replace(wan.t2v_1b(), width=48, height=32))
        assert (read.dit.width, read.dit.in_channels, read.dit.audio) == (config.dit.width, 16, None)
        assert read.sampling == wan.t2v_1b().sampling
        loaded = load_weights(folder, read)
        assert loaded.image == loaded.speech == {} and set(COMPONENTS) > {"dit", "vae", "text"}
    small = {"weights": folder, "size": "48x32", "frames": 9, "steps": 1, "instruction": "a cat", "config": ""}
    assert kavatar(files, **small).exit_code == 0
    told = json.loads((files / "video.json").read_text())
    assert told["config"]["name"] == "wan:t2v_1b" and told["config"]["dit"]["width"] == config.dit.width
    assert "from words alone" in bad(files, **small | {"portrait": files / "first.png"})
    assert "does not listen" in bad(files, mode="single", weights=folder, config="stableavatar")


def test_what_the_mode_cannot_do(files):
    first, last = files / "first.png", files / "last.png"
    words = {"instruction": "a cat boxes"}
    assert "nobody speaks" in bad(files, speech=files / "talk.wav", **words)
    assert "nobody speaks" in bad(files, storyline_out=files / "plan.json", **words)
    assert "nearest is 81" in bad(files, frames=80, **words)
    assert "nearest is 5" in bad(files, frames=0, **words)
    assert "nearest is 48x32" in bad(files, size="50x30", **words)
    assert "give --instruction" in bad(files)
    assert "--portrait" in bad(files, last_frame=last, config="wan:tiny_flf2v", **words)
    assert "needs Wan2.1's weights" in bad(files, config="", **words)
    assert "is made for speech" in bad(files, config="demo:tiny", **words)
    assert "wan:i2v_480p" in bad(files, portrait=first, **words)
    assert "wan:flf2v_720p" in bad(files, portrait=first, last_frame=last, config="wan:tiny_i2v", **words)
    assert "a last frame, and a portrait is given" in bad(files, portrait=first, config="wan:tiny_flf2v", **words)
    assert "no such file" in bad(files, portrait=files / "nobody.png", config="wan:tiny_i2v", **words)
    assert "is for --mode video" in bad(files, mode="single", frames=9, config="demo:tiny")
    assert "is for --mode video" in bad(files, mode="cascade", last_frame=last, config="demo:tiny")
    assert "does not listen" in bad(files, mode="single")
    assert "nobody speaks: leave it at 1" in bad(files, set="sampling.audio_attention=2", **words)
    assert "there is no picture" in bad(files, set="sampling.frame_scale=2", **words)
