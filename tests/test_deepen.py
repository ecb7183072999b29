"""A deeper transformer: the same velocity to the bit, and blocks that learn."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.checkpoint.weights import load_component, read_config, save_component
from kavatar_jax.config import AudioAdapterConfig, DiTConfig
from kavatar_jax.models import dit
from kavatar_jax.models.components import abstract
from kavatar_jax.models.dit import DiT, Inputs
from tools import deepen

CONFIG = replace(
    demo.tiny().dit, predicts="change", skip=True, reference="every", image_width=None,
    audio=AudioAdapterConfig(speech_width=64, projection=(48,), heads=2, mlp=64, layers=1, pack=5),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights all of whose numbers are drawn, those that start at zero as well, and a text encoder beside them."""
    path, rng = tmp_path_factory.mktemp("weights"), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: dit.init(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    save_component(params, CONFIG, path / "dit")
    save_component({"bias": np.ones(3, np.float32)}, demo.tiny().text, path / "text")
    return path


def load(folder):
    config = read_config(folder / "dit", DiTConfig)
    wanted = abstract("dit", config)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return config, load_component(folder / "dit", wanted, jax.tree.map(lambda _: place, wanted))


def velocity(config, params):
    rng = np.random.default_rng(1)
    c, draw = config, lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    inputs = Inputs(
        latents=draw(1, 2, 4, 4, c.out_channels), timestep=jnp.array([700.0]), text=draw(1, c.text_length, c.text_width),
        condition=draw(1, 2, 4, 4, c.in_channels - c.out_channels), image=None,
        speech=draw(1, 10, 64), slices=jnp.arange(10).reshape(1, 2, 5),
    )  # fmt: skip
    return DiT(config).apply({"params": params}, inputs).velocity


def test_more_blocks_compute_the_same(folder, tmp_path, capsys):
    assert deepen.main([str(folder), str(tmp_path / "out"), "--after", "1,0"]) == 0
    assert "4 blocks" in capsys.readouterr().out
    (config, params), (deeper, grown) = load(folder), load(tmp_path / "out")
    assert (config.layers, deeper.layers) == (2, 4) and replace(deeper, layers=2) == config
    np.testing.assert_array_equal(velocity(deeper, grown), velocity(config, params))
    for kept, (first, second) in {0: (0, 1), 1: (2, 3)}.items():
        up, down = grown["blocks"]["up"]["kernel"], grown["blocks"]["down"]["kernel"]
        np.testing.assert_array_equal(up[first], params["blocks"]["up"]["kernel"][kept])
        np.testing.assert_array_equal(up[second], up[first])
        assert not np.any(down[second]) and np.all(down[first])
    assert Tensors(tmp_path / "out" / "text" / "model.safetensors")["bias"].tolist() == [1, 1, 1]


def test_what_cannot_be_deepened(folder, tmp_path, capsys):
    def said(after, out=tmp_path / "out"):
        assert deepen.main([str(folder), str(out), "--after", after]) == 2
        return capsys.readouterr().err

    assert "block 2, and" in said("0,2") and "twice" in said("1,1") and "as in 1,3,5" in said("all")
    assert "exists" in said("0", folder) and not (tmp_path / "out").exists()
