"""Gathering networks of several runs into one weights directory."""

import jax
import numpy as np
import pytest

from configs import demo
from kavatar_jax.cascade.weights import check_complete
from kavatar_jax.checkpoint.bridge import flatten
from kavatar_jax.checkpoint.weights import load_component, read_config, save_component
from kavatar_jax.models.components import COMPONENTS, abstract
from tools import bundle


@pytest.fixture
def runs(tmp_path):
    """Two runs: one left a text encoder and its tokenizer, the other the features of speech, which have no weights."""
    config, rng = demo.config(), np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract("text", config.text))
    save_component(drawn, config.text, tmp_path / "one" / "text")
    (tmp_path / "one" / "tokenizer").mkdir()
    (tmp_path / "one" / "tokenizer" / "config.json").write_text('{"kind": "bytes"}')
    save_component({}, config.speech, tmp_path / "two" / "speech")
    return tmp_path, drawn


@pytest.mark.parametrize("half", [False, True])
def test_networks_of_two_runs(runs, half):
    folder, drawn = runs
    assert bundle.main([str(folder / name) for name in ("out", "one", "two")] + ["--half"] * half) == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["speech", "text", "tokenizer"]
    config = demo.config()
    for name in ("text", "speech"):
        assert read_config(folder / "out" / name, *COMPONENTS[name].kinds) == getattr(config, name)
    wanted = abstract("text", config.text)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = flatten(load_component(folder / "out" / "text", wanted, jax.tree.map(lambda _: place, wanted)))
    for path, values in flatten(drawn).items():
        assert loaded[path].dtype == np.float32
        np.testing.assert_allclose(loaded[path], values, rtol=2**-8 if half else 0)
    size, full = ((folder / where / "text" / "model.safetensors").stat().st_size for where in ("out", "one"))
    assert size == full if not half else 0.49 < size / full < 0.52


def test_what_is_missing_is_drawn(runs):
    folder, _ = runs
    assert bundle.main([str(folder / "out"), str(folder / "one"), "--half", "--fill", "demo:tiny"]) == 0
    check_complete(folder / "out")
    assert (
        read_config(folder / "out" / "text", *COMPONENTS["text"].kinds) == demo.config().text
    )  # not drawn: it was there
    assert read_config(folder / "out" / "vae", *COMPONENTS["vae"].kinds) == demo.tiny().vae


def test_what_cannot_be_gathered(runs, capsys):
    folder, _ = runs
    assert bundle.main([str(folder / "out"), str(folder / "one"), str(folder / "one")]) == 2
    assert "both" in capsys.readouterr().err
    assert bundle.main([str(folder / "out"), str(folder)]) == 2
    assert "holds no network" in capsys.readouterr().err
