"""A sampling step of 24 windows on eight devices: the numbers of one device, an eighth of the work, and who sends what."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from kavatar_jax.config import MeshConfig, load_config, set_fields
from kavatar_jax.models.components import abstract
from kavatar_jax.parallel.mesh import make_mesh
from tools.benchmarks.hlo import cost_of
from tools.benchmarks.programs import denoise

WINDOWS = 24
FIELDS = ["sampling.windows_per_batch=1", "width=96", "height=64"]


def draw(leaf, sharding, number):
    """Numbers about zero; where they are rows of something, the first."""
    rng = np.random.default_rng(number)
    if np.issubdtype(leaf.dtype, np.integer):
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding)
    return jax.device_put(rng.uniform(-0.5, 0.5, leaf.shape).astype(leaf.dtype), sharding)


@functools.cache
def run(mesh: MeshConfig, devices: int):
    """What the step gives on so many devices, and its cost on each."""
    config = set_fields(load_config("demo:tiny"), FIELDS)
    with jax.set_mesh(make_mesh(**dataclasses.asdict(mesh), devices=jax.devices()[:devices])):
        lowered = denoise(config, WINDOWS).traced.lower()
        compiled = lowered.compile()
        leaves, tree = jax.tree.flatten(lowered.args_info)
        places = jax.tree.leaves(compiled.input_shardings)
        arguments, _ = tree.unflatten(draw(*pair, i) for i, pair in enumerate(zip(leaves, places, strict=True)))
        history, _ = compiled(*arguments)
        return np.asarray(history.x), cost_of(compiled.as_text())


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=4), MeshConfig(data=2, context=2, tensor=2)])
def test_a_step_on_eight_devices_gives_the_numbers_of_one(mesh):
    alone, _ = run(MeshConfig(), 1)
    spread, _ = run(mesh, 8)
    assert alone.std() > 0.01
    np.testing.assert_allclose(spread, alone, atol=1e-5 * np.abs(alone).max())


def test_windows_over_devices_share_the_work_and_send_only_velocities():
    """Nothing is gathered: to either neighbour goes no more than the velocities of one window. Where a slot has several
    windows the compiler fuses them channel by channel, for which velocities and weights change places and come back."""
    _, alone = run(MeshConfig(), 1)
    _, spread = run(MeshConfig(), 8)
    assert spread.flops == pytest.approx(alone.flops / 8, rel=0.03)
    assert set(spread.sent) <= {"collective-permute", "all-to-all"}
    assert 0 < spread.sent["collective-permute"] <= 2 * window_bytes()
    assert spread.sent["all-to-all"] <= 4 * WINDOWS / 8 * window_bytes()


def test_of_weights_in_parts_only_weights_are_gathered():
    """Once for every group of windows; what else moves is latents where windows meet, and timesteps."""
    _, whole = run(MeshConfig(), 1)
    _, parts = run(MeshConfig(data=2, fsdp=4), 8)
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(abstract("dit", load_config("demo:tiny").dit)))
    assert parts.flops == pytest.approx(whole.flops / 8, rel=0.03)
    assert set(parts.sent) == {"collective-permute", "all-gather", "all-to-all"}
    assert 0 < parts.sent["all-gather"] <= 3 / 4 * weights * WINDOWS / 8
    assert parts.sent["all-to-all"] <= 4 * WINDOWS / 8 * window_bytes()


def window_bytes() -> int:
    config = set_fields(load_config("demo:tiny"), FIELDS)
    places = config.width * config.height // config.vae.side**2
    return 4 * config.vae.latent_channels * places * config.sampling.window_latents
