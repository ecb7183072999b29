from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kavatar_jax.checkpoint.bridge import reference_shapes, to_kavatar, to_torch, unflatten
from kavatar_jax.config import Wav2Vec2Config
from kavatar_jax.models import wav2vec2
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import partition
from tools import reference
from tools.reference import hashed_weights
from tools.reference import wav2vec2 as parity
from tools.reference.synthetic_weights import Fixture

FIXTURE = Fixture(Path(__file__).parent / "golden" / "wav2vec2_small")
TINY = Wav2Vec2Config(
    width=32,
    heads=4,
    layers=2,
    mlp=48,
    conv_widths=(16,) * 7,
    conv_kernels=(10, 3, 3, 3, 3, 2, 2),
    conv_strides=(5, 2, 2, 2, 2, 2, 2),
    position_kernel=16,
    position_groups=4,
    stable=False,
    conv_bias=False,
)
STABLE = replace(TINY, stable=True, conv_bias=True)


def abstract(config):
    return jax.eval_shape(partial(wav2vec2.init, config), jax.random.key(0))


def hashed(config):
    weights = hashed_weights.weights(reference_shapes(wav2vec2.TORCH, abstract(config)))
    return jax.device_put(unflatten(to_kavatar(weights, wav2vec2.TORCH, abstract(config))))


@partial(jax.jit, static_argnums=0)
def listen(config, params, samples):
    return wav2vec2.Wav2Vec2(config).apply({"params": params}, samples)


@pytest.fixture(scope="module")
def tiny():
    return {c: hashed(c) for c in (TINY, STABLE)}


@pytest.fixture(scope="module")
def windows():
    return wav2vec2.normalise(np.random.default_rng(0).standard_normal((4, 3000)))


def test_golden():
    errors = {name: FIXTURE.check(name, value) for name, value in parity.run(FIXTURE)}
    assert errors.keys() == FIXTURE.meta["outputs"].keys()


def test_golden_notices_one_wrong_tensor(monkeypatch):
    true, wrong = reference.synthesize_tensor, "wav2vec2.encoder.layers.1.feed_forward.output_dense.weight"
    corrupt = lambda key, *rest: true(key, *rest) * (1.01 if key == wrong else 1)  # noqa: E731
    monkeypatch.setattr(reference, "synthesize_tensor", corrupt)
    with pytest.raises(AssertionError, match="last_hidden_state.*exceeds"):
        for name, value in parity.run(FIXTURE):
            FIXTURE.check(name, value)


RECORDED = {  # transformers' Wav2Vec2Model on hashed weights: mean, std and elements of `last`, elements of hidden[0]
    False: (
        (0.007669, 1.010844),
        {0: 0.72391, 1: -0.90436, 17: -0.55239, 101: -1.90939, 3136: -0.31821, 6271: -1.71346},
        {0: 0.86652, 1: -0.45514, 17: -0.06005, 101: 0.43656, 3136: -0.49871, 6271: -0.96202},
    ),
    True: (
        (0.010650, 1.008347),
        {0: -0.05166, 1: 0.66295, 17: -0.05620, 101: -1.49202, 3136: -0.35425, 6271: 0.34253},
        {0: 0.82788, 1: 2.22376, 17: 0.96041, 101: -0.64765},
    ),
}


@pytest.mark.parametrize("stable", [False, True])
def test_recorded_values(stable):
    sizes = {"width": 128, "mlp": 256, "layers": 3, "conv_widths": (512,) * 7, "position_kernel": 128}
    config = replace(TINY, **sizes, position_groups=16, stable=stable, conv_bias=stable)
    shapes = reference_shapes(wav2vec2.TORCH, abstract(config))
    shapes = {_newer_name(key.removeprefix("wav2vec2.")): shape for key, shape in shapes.items()}
    weights = hashed_weights.weights(shapes | {"masked_spec_embed": (128,)})
    params = to_kavatar(weights, wav2vec2.TORCH, abstract(config), unused=wav2vec2.UNUSED)
    outputs = listen(config, unflatten(params), hashed_weights.draw((1, 16000), 0))
    last, first = np.asarray(outputs.last), np.asarray(outputs.hidden[0])
    assert last.shape == (1, 49, 128)
    moments, last_expected, first_expected = RECORDED[stable]
    assert (last.mean(), last.std()) == pytest.approx(moments, abs=1e-4)
    for array, expected in ((last, last_expected), (first, first_expected)):
        np.testing.assert_allclose(array.reshape(-1)[list(expected)], list(expected.values()), atol=1e-4)


def _newer_name(key):
    newer = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    stem, _, leaf = key.rpartition(".")
    return f"{stem}.{newer.get(leaf, leaf)}"


@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
@pytest.mark.parametrize("newer", [False, True])
def test_every_spelling_is_read(prefix, newer):
    legacy = FIXTURE.weights()
    del legacy["wav2vec2.masked_spec_embed"]  # as in the published recogniser
    config = wav2vec2.config_of(dict(FIXTURE.shapes()), FIXTURE.meta["config"])
    spelled = {prefix + key.removeprefix("wav2vec2."): value for key, value in legacy.items()}
    spelled = {_newer_name(key) if newer else key: value for key, value in spelled.items()}
    spelled |= {"lm_head.weight": np.ones((2, 2), np.float32), "quantizer.codevectors": np.ones(2, np.float32)}
    assert wav2vec2.config_of({key: x.shape for key, x in spelled.items()}, FIXTURE.meta["config"]) == config
    params = to_kavatar(spelled, wav2vec2.TORCH, abstract(config), unused=wav2vec2.UNUSED)
    back = dict(to_torch(unflatten(params), wav2vec2.TORCH))
    assert back.keys() == legacy.keys()
    assert all(np.array_equal(back[key], legacy[key]) for key in legacy)


def test_two_spellings_at_once_are_refused():
    weights = FIXTURE.weights()
    key = "wav2vec2.encoder.pos_conv_embed.conv.weight_g"
    weights[_newer_name(key)] = weights[key]
    config = wav2vec2.config_of(dict(FIXTURE.shapes()), {"num_attention_heads": 4})
    with pytest.raises(ValueError, match="one of them only"):
        to_kavatar(weights, wav2vec2.TORCH, abstract(config), unused=wav2vec2.UNUSED)


def test_config_of_reads_the_shapes():
    shapes, released = dict(FIXTURE.shapes()), FIXTURE.meta["config"]
    config = wav2vec2.config_of(shapes, released)
    assert config == replace(TINY, width=48, layers=3, mlp=96, conv_widths=(32,) * 7)
    assert wav2vec2.config_of(shapes, {"num_attention_heads": 4}) == config
    with pytest.raises(ValueError, match="feat_extract_norm 'layer'"):
        wav2vec2.config_of(shapes, released | {"feat_extract_norm": "layer"})
    with pytest.raises(ValueError, match="hidden_act 'relu'"):
        wav2vec2.config_of(shapes, released | {"hidden_act": "relu"})
    with pytest.raises(ValueError, match="does not hold"):
        wav2vec2.config_of({"lm_head.weight": (4, 4)}, {})
    stable = reference_shapes(wav2vec2.TORCH, abstract(STABLE))
    assert wav2vec2.config_of(stable, {"num_attention_heads": 4, "do_stable_layer_norm": True}) == STABLE


def test_token_count():
    counts = {16000: 49, 51840: 161, 53760: 167, 43200: 134, 64800: 202, 80000: 249, 400: 1, 399: 0, 10: 0, 0: 0}
    assert {n: wav2vec2.token_count(n, TINY) for n in counts} == counts
    assert wav2vec2.receptive_field(TINY) == 400
    assert wav2vec2.token_count(400 + 319, TINY) == 1 and wav2vec2.token_count(400 + 320, TINY) == 2


def test_normalise():
    samples = np.random.default_rng(0).standard_normal((3, 1000)) * np.array([[0.01], [1], [50]]) + 7
    x = wav2vec2.normalise(samples)
    assert x.dtype == np.float32 and x.shape == (3, 1000)
    np.testing.assert_allclose(x.mean(axis=-1), 0, atol=1e-6)
    expected = np.sqrt(samples.var(axis=-1) / (samples.var(axis=-1) + 1e-7))
    assert expected[0] < 0.9996
    np.testing.assert_allclose(x.std(axis=-1), expected, rtol=1e-6)
    np.testing.assert_array_equal(wav2vec2.normalise(samples[1]), x[1])
    assert (wav2vec2.normalise(np.zeros(500, np.float32)) == 0).all()


@pytest.mark.parametrize("config", [TINY, STABLE], ids=["base", "stable"])
def test_windows_do_not_meet(tiny, windows, config):
    together = listen(config, tiny[config], windows)
    tokens = wav2vec2.token_count(3000, config)
    assert together.hidden.shape == (3, 4, tokens, 32) and together.features.shape == (4, tokens, 16)
    np.testing.assert_array_equal(together.hidden[-1], together.last)
    other = listen(config, tiny[config], np.concatenate([windows[1:], windows[:1]]))
    np.testing.assert_allclose(other.last[:3], together.last[1:], atol=2e-5)
    assert np.abs(together.last[0] - together.last[3]).max() > 0.1


def test_only_base_hears_the_whole_recording_in_its_convolutions(tiny, windows):
    """Base norms over time, so a change at the end is felt at the start; the norms of stable stay within a vector."""
    changed = windows.copy()
    changed[:, 2000:] *= 3
    untouched = wav2vec2.token_count(2000, TINY)
    for config, felt in ((TINY, True), (STABLE, False)):
        before, after = (listen(config, tiny[config], x).features[:, :untouched] for x in (windows, changed))
        assert (np.abs(after - before).max() > 1e-2) == felt


def test_bfloat16_stays_close(tiny, windows):
    full, half = (listen(replace(STABLE, dtype=dtype), tiny[STABLE], windows) for dtype in ("float32", "bfloat16"))
    assert half.last.dtype == jnp.bfloat16
    assert 1e-4 < np.linalg.norm(half.last.astype(np.float32) - full.last) / np.linalg.norm(full.last) < 0.05


def test_same_numbers_on_a_mesh(tiny, windows):
    alone = listen(TINY, tiny[TINY], windows)
    mesh = make_mesh(2, 2, 1, 2)
    with jax.set_mesh(mesh):
        shardings = partition(tiny[TINY], wav2vec2.AXES, mesh)
        spread = listen(TINY, jax.device_put(tiny[TINY], shardings), windows)
    assert shardings["blocks"]["up"]["kernel"].spec == P(None, "fsdp", "tensor")
    np.testing.assert_allclose(spread.last, alone.last, atol=2e-5)
