"""A video decoded by eight devices in parts of its pictures: the numbers of one, an eighth of the work, and what is sent."""

import math
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kavatar_jax.config import VAEConfig
from kavatar_jax.models import vae
from kavatar_jax.parallel.mesh import make_mesh, picture_mesh
from kavatar_jax.parallel.sharding import partition, replicated
from tools.benchmarks.hlo import cost_of

CONFIG = VAEConfig(
    width=6, latent_channels=4, multipliers=(1, 2), blocks=1, temporal=(True,),
    latent_mean=(0.1, -0.2, 0.3, 0.0), latent_std=(1.0, 2.0, 0.5, 1.5),
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def params():
    """Drawn everywhere, also what is zero in fresh ones, so that nothing stays unseen."""
    rng = np.random.default_rng(2)
    fresh = jax.jit(vae.init, static_argnums=0)(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), fresh)


@pytest.mark.parametrize(
    ("sizes", "picture", "cuts"),
    [
        ((8, 1, 1, 1), (4, 8), (2, 4)),
        ((2, 2, 2, 1), (4, 6), (2, 4)),
        ((8, 1, 1, 1), (11, 6), (4, 2)),
        ((8, 1, 1, 1), (3, 5), (2, 4)),
        ((8, 1, 1, 1), (17, 19), (2, 4)),
    ],
)
def test_all_devices_decode_a_video(params, sizes, picture, cuts):
    """Also where a side does not divide and lies in parts of unequal size, where a device gets nothing, and where positions,
    enough for the kernel's way over the mesh, do not divide."""
    latents = np.random.default_rng(11).standard_normal((5, *picture, 4)).astype(np.float32)
    alone = np.concatenate(list(vae.decode_stream(params, latents, CONFIG, pixels="float32")))
    devices = make_mesh(*sizes)
    rows, columns = cuts
    assert picture_mesh(devices, 2 * picture[0], 2 * picture[1]).devices.shape == (rows, 1, columns, 1)
    vae.decode_chunk.clear_cache()
    with jax.set_mesh(devices):
        placed = jax.device_put(params, partition(params, vae.AXES, devices))
        spread = np.concatenate(list(vae.decode_stream(placed, latents, CONFIG, pixels="float32")))
        assert vae.decode_chunk._cache_size() == 2
    np.testing.assert_allclose(spread, alone, atol=1e-5)


@pytest.mark.parametrize("size", [(36, 32), (37, 33)])
def test_each_device_decodes_its_share_of_a_video(params, size):
    (alone, _), (spread, state) = decoding_cost(params, 1, size), decoding_cost(params, 8, size)
    even = size == (36, 32)
    assert spread.products == pytest.approx(alone.products / 8, rel=0.03 if even else 0.08)
    # one frame's keys and values at the latents' size, to some devices its queries, and the finished pixels: everything else
    # stays where it is, also where parts are of unequal size
    assert set(spread.sent) == {"collective-permute", "all-gather"}
    queries, pixels = math.prod(size) * 12 * 4, 2 * math.prod(size) * 4 * 3
    most = 3 if even else 4.5
    assert (2 * queries + pixels) * 7 / 8 < spread.sent["all-gather"] < (most * queries + pixels) * 7 / 8
    assert all(leaf.sharding.spec[2:4] == ("data", "context") for leaf in jax.tree.leaves(state))


def decoding_cost(params, devices: int, size: tuple[int, int]):
    """Of a frame in the middle of a video, and what it looks back on: so many latents that queries are enough for the
    kernel's way over the mesh."""
    height, width = size
    grid = picture_mesh(make_mesh(devices, devices=jax.devices()[:devices]), 2 * height, 2 * width)
    with jax.set_mesh(grid):
        params, piece = jax.device_put((params, jnp.zeros((1, 1, *size, 4))), replicated(grid))
        state = vae.decode_chunk(params, piece, None, config=CONFIG, pixels="uint8")[1]
        lowered = vae.decode_chunk.lower(params, piece, state, config=CONFIG, pixels="uint8")
        return cost_of(lowered.compile().as_text()), state


@pytest.mark.parametrize(
    ("kind", "devices", "size", "cuts"),
    [
        ("cpu", 16, (480, 832), (4, 4)),
        ("tpu", 16, (480, 832), (8, 2)),
        ("tpu", 16, (720, 1280), (8, 2)),
        ("tpu", 16, (1088, 1920), (4, 4)),
        ("tpu", 256, (480, 832), (16, 16)),
        ("tpu", 1, (480, 832), (1, 1)),
    ],
)
def test_where_pictures_are_cut(kind, devices, size, cuts):
    """Parts as square as can be, but wider on TPUs where too much would be filled up; not if all cuts do that."""
    there = np.array([Mock(platform=kind)] * devices)
    grid = picture_mesh(Mock(devices=there, size=devices, axis_types=None), *size)
    assert (grid.shape["data"], grid.shape["context"]) == cuts
