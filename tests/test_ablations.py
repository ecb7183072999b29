"""The ablations: where windows show, what a long video is judged by, a run's recipe, and bad orders."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import demo
from kavatar_jax.cascade.command import DEMO
from kavatar_jax.checkpoint.bridge import flatten
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.puppets.identity import sample_identity
from kavatar_jax.puppets.measure import Reading, read
from kavatar_jax.puppets.stage import render_portrait
from kavatar_jax.training.state import begin
from tools import ablations, scenes


def test_edges_are_where_windows_begin_and_end():
    """Windows of 9 latents, 6 apart: the second begins at latent 6, which is frame 21, the first ends before latent 9."""
    config = demo.config()
    assert ablations.window_edges(33, config) == ()
    assert ablations.window_edges(57, config) == (20, 32)
    assert ablations.window_edges(58, config) == (20, 32, 44, 56)


def test_a_long_video_is_judged_by_its_ends_and_its_edges(monkeypatch):
    """A mouth that follows for the first half only, and a picture that jumps where windows begin."""
    monkeypatch.setattr(ablations, "ENDS", 40)
    config, frames = demo.config(), 120
    portrait = render_portrait(sample_identity(7))
    rest = read(portrait[None], portrait)
    reading = Reading(
        *(np.repeat(np.asarray(getattr(rest, field.name)), frames, axis=0) for field in dataclasses.fields(Reading))
    )
    rng = np.random.default_rng(0)
    truth = rng.random(frames)
    heard = np.where(np.arange(frames) < 60, truth, rng.random(frames))
    steps = np.ones(frames - 1)
    steps[list(ablations.window_edges(frames, config))] = 3
    scene = scenes.Scene(name="", puppet=0, asked="", request=None, truth=truth)
    seen = scenes.Seen(
        scene=scene, reading=dataclasses.replace(reading, mouth_open=heard), portrait=rest, steps=steps, cuts=(), stills=[],
    )  # fmt: skip
    found = ablations.judge_long(seen, config)
    assert found["sync early"] > 0.99 and 0.2 < found["sync"] < 0.8 and abs(found["sync late"]) < 0.4
    assert found["CIEDE early"] == found["CIEDE late"] == 0
    assert found["edge step / 95th percentile"] == pytest.approx(3)


@pytest.mark.parametrize("name", ["whole", "no adapter"])
def test_a_run_begins_with_the_transformer_but_for_its_adapter(name):
    """Also where the file holds parts of an adapter that the run's has not."""
    arguments = SimpleNamespace(train="clips", weights=DEMO, steps=1, recipe="demo_dit", fields=[])
    run, stored = ablations.recipe(arguments, name), Tensors(DEMO / "dit" / "model.safetensors")
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        found, frozen, _ = begin(run, ["dit"], mesh)
    learns, stays = (flatten(tree["params"]["dit"]) for tree in (found.trained, frozen))
    assert any("audio/blocks" in path for path in learns) == (name == "whole")
    same = [path for path in learns | stays if np.array_equal((learns | stays)[path], stored[path].astype(np.float32))]
    anew = [path for path in learns if re.fullmatch("|".join(ablations.ANEW), f"dit/{path}")]
    assert set(same) >= stays.keys() and len(same) > 20 and not any("kernel" in path for path in set(same) & set(anew))


def test_bad_orders(tmp_path, capsys):
    def said(*words):
        order = ["--weights", str(tmp_path), "--out", str(tmp_path / "out.json"), *words]
        assert ablations.main(order) == 2
        message = capsys.readouterr().err
        assert message.startswith("ablations: ") and message.count("\n") == 1
        return message

    assert "incomplete" in said()
    assert "at least 400" in said("--long-frames", "10")
    assert "nothing to do" in said("--long-frames", "0")
    assert "name a file" in said("--out", str(tmp_path)) and "training run" in said("--config", "demo_dit")
    assert "does not train a transformer" in said("--train", str(tmp_path), "--recipe", "demo_text")
    assert not (tmp_path / "out.json").exists()
