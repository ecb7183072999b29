from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kavatar_jax.checkpoint.bridge import flatten, reference_shapes, to_kavatar, to_torch, unflatten
from kavatar_jax.config import CLIPConfig
from kavatar_jax.models import clip
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import partition
from tools import reference
from tools.reference import clip as parity
from tools.reference import hashed_weights
from tools.reference.synthetic_weights import Fixture

FIXTURE = Fixture(Path(__file__).parent / "golden" / "clip_small")
TINY = CLIPConfig(width=32, heads=4, layers=3, mlp=48, image_size=28, patch=7, embedding=12)


def abstract(config):
    return jax.eval_shape(partial(clip.init, config), jax.random.key(0))


def hashed(config):
    weights = hashed_weights.weights(reference_shapes(clip.TORCH, abstract(config)))
    return jax.device_put(unflatten(to_kavatar(weights, clip.TORCH, abstract(config))))


@partial(jax.jit, static_argnums=0)
def look(config, params, pixels):
    return clip.CLIP(config).apply({"params": params}, pixels)


@pytest.fixture(scope="module")
def tiny():
    return hashed(TINY)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).standard_normal((4, 28, 28, 3)).astype(np.float32)


def test_golden():
    errors = {name: FIXTURE.check(name, value) for name, value in parity.run(FIXTURE)}
    assert errors.keys() == FIXTURE.meta["outputs"].keys()


def test_golden_notices_one_wrong_tensor(monkeypatch):
    true, wrong = reference.synthesize_tensor, "visual.transformer.2.mlp.0.weight"
    corrupt = lambda key, *rest: true(key, *rest) * (1.01 if key == wrong else 1)  # noqa: E731
    monkeypatch.setattr(reference, "synthesize_tensor", corrupt)
    with pytest.raises(AssertionError, match="exceeds"):
        FIXTURE.check(*next(parity.run(FIXTURE)))


def test_recorded_values():
    """Values of Wan2.1's own tower on hashed weights."""
    config = CLIPConfig(width=80, heads=5, layers=4, mlp=320, image_size=224, patch=14, embedding=32)
    shapes = {key.removeprefix("visual."): s for key, s in reference_shapes(clip.TORCH, abstract(config)).items()}
    weights = {f"visual.{key}": value for key, value in hashed_weights.weights(shapes).items()}
    params = unflatten(to_kavatar(weights, clip.TORCH, abstract(config)))
    image = hashed_weights.draw((1, 3, 224, 224), 0).transpose(0, 2, 3, 1)
    tokens = np.asarray(look(config, params, image).tokens)
    assert tokens.shape == (1, 257, 80)
    assert (tokens.mean(), tokens.std()) == pytest.approx((-0.031883, 1.674465), abs=1e-4)
    expected = {0: -0.20746, 1: -0.19094, 17: -0.22963, 101: 0.13458, 10280: 1.70675, 20559: -0.33666}
    np.testing.assert_allclose(tokens.reshape(-1)[list(expected)], list(expected.values()), atol=1e-4)


def test_tokens_are_those_before_the_last_block(tiny, pixels):
    outputs = look(TINY, tiny, pixels)
    assert outputs.tokens.shape == (4, 17, 32) and outputs.embedding.shape == (4, 12)
    shorter = tiny | {"blocks": jax.tree.map(lambda x: x[:2], tiny["blocks"])}
    before = look(replace(TINY, layers=2), shorter, pixels)
    assert np.abs(before.tokens - outputs.tokens).max() > 0.1
    # the class token after two blocks, normed and projected by hand, is the shorter tower's embedding
    token = np.asarray(outputs.tokens[:, 0], np.float64)
    token = (token - token.mean(-1, keepdims=True)) / np.sqrt(token.var(-1, keepdims=True) + 1e-5)
    by_hand = (token * tiny["norm_post"]["scale"] + tiny["norm_post"]["bias"]) @ np.asarray(tiny["head"]["kernel"])
    np.testing.assert_allclose(before.embedding, by_hand, atol=1e-5)


def test_patches_are_row_major(tiny, pixels):
    """Changing the patch in row 1, column 2 moves the position that a one-layer tower's tokens keep for it the most."""
    shallow = replace(TINY, layers=1)
    params = tiny | {"blocks": jax.tree.map(lambda x: x[:1], tiny["blocks"])}
    changed = pixels[:1].copy()
    changed[:, 7:14, 14:21] += 1.0
    moved = look(shallow, params, changed).tokens - look(shallow, params, pixels[:1]).tokens
    assert np.flatnonzero(np.abs(moved).max(axis=(0, 2))).tolist() == [1 + 4 + 2]


def test_preprocess_keeps_a_picture_of_the_right_size():
    picture = np.random.default_rng(1).uniform(-1, 1, (2, 28, 28, 3)).astype(np.float32)
    expected = ((picture + 1) / 2 - clip.MEAN) / clip.STD
    got = clip.preprocess(picture, TINY)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert clip.preprocess(picture[:, :20, :13], TINY).shape == (2, 28, 28, 3)


def test_round_trip_is_exact():
    weights = FIXTURE.weights()
    config = clip.config_of(dict(FIXTURE.shapes()), FIXTURE.meta["config"])
    rest = {"textual.norm.weight": np.ones(3, np.float32), "log_scale": np.ones((), np.float32)}
    params = to_kavatar(weights | rest, clip.TORCH, abstract(config), unused=clip.UNUSED)
    fused = weights["visual.transformer.1.attn.to_qkv.weight"]
    np.testing.assert_array_equal(params["blocks/k/kernel"][1], fused[64:128].T)
    back = dict(to_torch(unflatten(params), clip.TORCH))
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[key], weights[key]) for key in weights)


def test_config_of_reads_the_shapes():
    shapes = dict(FIXTURE.shapes())
    expected = CLIPConfig(width=64, heads=4, layers=4, mlp=256, image_size=224, patch=14, embedding=24)
    assert clip.config_of(shapes, {"num_heads": 4}) == expected
    with pytest.raises(ValueError, match="num_heads"):
        clip.config_of(shapes, {})
    with pytest.raises(ValueError, match="does not hold"):
        clip.config_of({"token_embedding.weight": (4, 4)}, {})
    published = CLIPConfig(width=1280, heads=16, layers=32, mlp=5120, image_size=224, patch=14, embedding=1024)
    tensors = reference_shapes(clip.TORCH, abstract(published))
    assert clip.config_of(tensors, {}) == published
    assert len(tensors) == 392
    assert sum(leaf.size for leaf in flatten(abstract(published)).values()) == 632_076_800


def test_bfloat16_stays_close(tiny, pixels):
    full, half = look(TINY, tiny, pixels), look(replace(TINY, dtype="bfloat16"), tiny, pixels)
    assert half.tokens.dtype == jnp.bfloat16
    error = np.linalg.norm(half.embedding.astype(np.float32) - full.embedding) / np.linalg.norm(full.embedding)
    assert 1e-4 < error < 0.05


def test_same_numbers_on_a_mesh(tiny, pixels):
    alone = look(TINY, tiny, pixels)
    mesh = make_mesh(2, 2, 1, 2)
    with jax.set_mesh(mesh):
        shardings = partition(tiny, clip.AXES, mesh)
        spread = look(TINY, jax.device_put(tiny, shardings), pixels)
    assert shardings["blocks"]["down"]["kernel"].spec == P(None, "tensor", "fsdp")
    np.testing.assert_allclose(spread.tokens, alone.tokens, atol=2e-5)
    np.testing.assert_allclose(spread.embedding, alone.embedding, atol=2e-5)
