import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kavatar_jax.checkpoint.bridge import Row, flatten, reference_shapes, to_kavatar, to_torch, unflatten
from kavatar_jax.config import UMT5Config
from kavatar_jax.models import umt5
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import partition
from tools import reference
from tools.reference import hashed_weights
from tools.reference import umt5 as parity
from tools.reference.synthetic_weights import Fixture

FIXTURE = Fixture(Path(__file__).parent / "golden" / "umt5_small")
TINY = UMT5Config(vocabulary=300, width=64, heads=4, head_width=16, mlp=96, layers=3)


def abstract(config):
    return jax.eval_shape(partial(umt5.init, config), jax.random.key(0))


@partial(jax.jit, static_argnums=0)
def apply(config, params, ids, mask):
    return umt5.UMT5(config).apply({"params": params}, ids, mask)


def encode(config, params, ids, mask):
    return np.asarray(apply(config, params, ids, mask))


@pytest.fixture(scope="module")
def tiny():
    return jax.jit(partial(umt5.init, TINY))(jax.random.key(1))


def test_golden():
    errors = {name: FIXTURE.check(name, value) for name, value in parity.run(FIXTURE)}
    assert errors.keys() == FIXTURE.meta["outputs"].keys()


def test_golden_notices_one_wrong_tensor(monkeypatch):
    true, wrong = reference.synthesize_tensor, "blocks.1.attn.q.weight"
    corrupt = lambda key, *rest: true(key, *rest) * (1.01 if key == wrong else 1)  # noqa: E731
    monkeypatch.setattr(reference, "synthesize_tensor", corrupt)
    with pytest.raises(AssertionError, match="exceeds"):
        FIXTURE.check(*next(parity.run(FIXTURE)))


def test_recorded_values():
    """Values of Wan2.1's own encoder on hashed weights."""
    shapes = reference_shapes(umt5.TORCH, abstract(TINY))
    params = unflatten(to_kavatar(hashed_weights.weights(shapes), umt5.TORCH, abstract(TINY)))
    ids = np.array([[5, 17, 200, 33, 9, 250, 1, 0, 0, 0, 0, 0]], np.int32)
    rows = encode(TINY, params, ids, ids > 0)[0, :7]
    assert (rows.mean(), rows.std()) == pytest.approx((-0.110233, 0.984679), abs=1e-4)
    expected = {0: -2.81536, 1: 0.55132, 17: 0.39660, 101: -1.29550, 224: -0.80415, 447: 1.73907}
    np.testing.assert_allclose(rows.reshape(-1)[list(expected)], list(expected.values()), atol=1e-4)


def test_buckets_of_the_published_encoder():
    starts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    assert umt5.bucket_starts(16, 128) == starts
    buckets = umt5.relative_buckets(200, buckets=32, max_distance=128)
    assert buckets.dtype == np.int32
    np.testing.assert_array_equal(buckets[0, starts[1:]], 16 + np.arange(1, 16))  # keys after the query
    np.testing.assert_array_equal(buckets[starts, 0], np.arange(16))  # keys before it
    assert buckets[0, 199] == 31 and buckets[199, 0] == 15
    assert (buckets[1:, 1:] == buckets[:-1, :-1]).all()


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (16, 64), (8, 100), (20, 77), (64, 1000)])
def test_buckets_agree_with_logarithms(buckets, max_distance):
    """floor(log(a / e) / log(m / e) * w) wherever rounding cannot decide."""
    half, exact = buckets // 2, buckets // 4
    distance = np.arange(exact, 3 * max_distance)
    place = np.log(distance / exact) / np.log(max_distance / exact) * (half - exact)
    sure = np.abs(place - np.round(place)) > 1e-9
    expected = np.minimum(exact + np.floor(place).astype(int), half - 1)
    got = umt5.relative_buckets(3 * max_distance, buckets=buckets, max_distance=max_distance)[distance, 0]
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(got[sure], expected[sure])


def test_padding_changes_nothing(tiny):
    ids = np.random.default_rng(0).integers(2, 300, (2, 40)).astype(np.int32)
    mask = np.arange(40) < np.array([[13], [40]])
    out = encode(TINY, tiny, ids, mask)
    assert (out[0, 13:] == 0).all() and (out[1] != 0).any(axis=-1).all()
    alone = encode(TINY, tiny, ids[:1, :13], mask[:1, :13])
    np.testing.assert_allclose(out[:1, :13], alone, atol=2e-5)
    other = encode(TINY, tiny, np.where(mask, ids, 7), mask)
    np.testing.assert_array_equal(out, other)


def test_every_layer_has_its_own_positions(tiny):
    ids, mask = np.arange(24, dtype=np.int32)[None], np.ones((1, 24), bool)
    out = encode(TINY, tiny, ids, mask)
    for layer in range(TINY.layers):
        flat = flatten(tiny)
        flat["blocks/attn/positions"] = flat["blocks/attn/positions"].at[layer, 20].add(1.0)
        assert np.abs(encode(TINY, unflatten(flat), ids, mask) - out).max() > 1e-3


def test_bfloat16_stays_close(tiny):
    ids, mask = np.arange(24, dtype=np.int32)[None], np.ones((1, 24), bool)
    full, half = encode(TINY, tiny, ids, mask), encode(replace(TINY, dtype="bfloat16"), tiny, ids, mask)
    assert half.dtype == jnp.bfloat16
    error = np.linalg.norm(half.astype(np.float32) - full) / np.linalg.norm(full)
    assert 1e-4 < error < 0.05


def test_round_trip_is_exact():
    weights = FIXTURE.weights()
    config = umt5.config_of(dict(FIXTURE.shapes()), {})
    params = to_kavatar(weights, umt5.TORCH, abstract(config), unused=umt5.UNUSED)
    back = dict(to_torch(unflatten(params), umt5.TORCH))
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[key], weights[key]) for key in weights)


def test_names_of_transformers():
    ours = to_kavatar(FIXTURE.weights(), umt5.TORCH, abstract(umt5.config_of(dict(FIXTURE.shapes()), {})))
    rows = [Row(row.key.split("|")[1], row.path, row.layout) for row in umt5.TORCH]
    theirs = dict(to_torch(unflatten(ours), rows))
    assert "encoder.block.2.layer.1.DenseReluDense.wi_0.weight" in theirs
    theirs["encoder.embed_tokens.weight"] = theirs["shared.weight"]  # they save the tied table twice
    config = umt5.config_of({key: x.shape for key, x in theirs.items()}, {"relative_attention_max_distance": 96})
    assert config == replace(umt5.config_of(dict(FIXTURE.shapes()), {}), max_distance=96)
    same = to_kavatar(theirs, umt5.TORCH, abstract(config), unused=umt5.UNUSED)
    assert all(np.array_equal(ours[path], same[path]) for path in ours)


def test_config_of_reads_the_shapes():
    config = umt5.config_of(dict(FIXTURE.shapes()), {})
    assert config == UMT5Config(vocabulary=700, width=96, heads=4, head_width=32, mlp=224, layers=3)
    with pytest.raises(ValueError, match="does not hold"):
        umt5.config_of({"visual.head": (4, 4)}, {})


@pytest.fixture(scope="module")
def words():
    ids = np.random.default_rng(2).integers(2, 300, (4, 16)).astype(np.int32)
    return ids, np.arange(16) < np.array([[3], [16], [9], [12]])


def test_same_numbers_on_a_mesh(tiny, words):
    alone = encode(TINY, tiny, *words)
    mesh = make_mesh(2, 2, 1, 2)
    with jax.set_mesh(mesh):
        shardings = partition(tiny, umt5.AXES, mesh)
        spread = encode(TINY, jax.device_put(tiny, shardings), *words)
    assert shardings["blocks"]["attn"]["q"]["kernel"].spec == P(None, "fsdp", "tensor")
    np.testing.assert_allclose(spread, alone, atol=2e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (8, 1, 1, 1), (2, 2, 1, 2)])
def test_same_numbers_from_the_hosts_memory(tiny, words, sizes):
    alone = encode(TINY, tiny, *words)
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh):
        waiting = jax.device_put(tiny, partition(tiny, umt5.AXES, mesh, on_host=True))
        brought = encode(TINY, waiting, *words)
    on_host = [leaf for leaf in jax.tree.leaves(waiting) if leaf.sharding.memory_kind == "pinned_host"]
    assert sum(leaf.nbytes for leaf in on_host) > 0.95 * sum(leaf.nbytes for leaf in jax.tree.leaves(waiting))
    # every device's host memory holds an equal part of each
    assert all(leaf.addressable_shards[0].data.size == leaf.size // mesh.size for leaf in on_host)
    np.testing.assert_allclose(brought, alone, atol=2e-5)
