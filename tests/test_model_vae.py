import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kavatar_jax.checkpoint.bridge import flatten, reference_shapes, to_kavatar, to_torch, unflatten
from kavatar_jax.config import VAEConfig
from kavatar_jax.models import vae, vae_layers
from kavatar_jax.parallel import mesh
from kavatar_jax.parallel.sharding import partition, place_of
from tools import reference
from tools.reference import vae as parity
from tools.reference.synthetic_weights import Fixture

FIXTURE = Fixture(str(Path(__file__).parent / "golden" / "vae_small"))
STATISTICS = {"latent_mean": (0.1, -0.2, 0.3, 0.0), "latent_std": (1.0, 2.0, 0.5, 1.5)}
FOUR_LEVELS = VAEConfig(width=5, latent_channels=4, **STATISTICS)
THREE_LEVELS = replace(FOUR_LEVELS, multipliers=(1, 2, 2), blocks=1, temporal=(True, True))  # odd widths and sizes
TWO_LEVELS = VAEConfig(width=6, latent_channels=4, multipliers=(1, 2), blocks=1, temporal=(True,), **STATISTICS)
LATENTS = np.random.default_rng(0).standard_normal((7, 3, 5, 4)).astype(np.float32)
VIDEO = np.random.default_rng(1).uniform(-1, 1, (1, 25, 12, 20, 3)).astype(np.float32)

pytestmark = pytest.mark.usefixtures("quick_compilation")
init = jax.jit(vae.init, static_argnums=0)  # compiled once, where it would be operation by operation


def abstract(config):
    return jax.eval_shape(partial(vae.init, config), jax.random.key(0))


def lively(config):
    """Fresh parameters, but with gains, biases and the last layer of attention drawn too: nothing may stay unseen."""
    params = flatten(init(config, jax.random.key(0)))
    rng = np.random.default_rng(2)
    for path, leaf in jax.device_get(params).items():
        if not path.endswith("kernel") or path.endswith(("project/kernel", "bypass/kernel")):
            params[path] = leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
    return unflatten(params)


@pytest.fixture(scope="module")
def params():
    return lively(THREE_LEVELS)


@pytest.fixture(scope="module")
def whole(params):
    """The closed form: every frame of a video, and every latent frame, in one call."""
    frames = jax.jit(partial(vae.decode, config=THREE_LEVELS, chunk=None))(params, LATENTS[None])
    moments = jax.jit(partial(vae.encode, config=THREE_LEVELS, chunk=None))(params, VIDEO)
    assert frames.shape == (1, 25, 12, 20, 3) and moments[0].shape == (1, 7, 3, 5, 4)
    return np.asarray(frames[0]), [np.asarray(part) for part in moments]


@pytest.fixture(scope="module")
def small():
    return lively(TWO_LEVELS)


@partial(jax.jit, static_argnames=("config", "chunk"))
def through(params, video, config, chunk):
    mean, logvar = vae.encode(params, video, config, chunk=chunk)
    return mean, logvar, vae.decode(params, mean, config, chunk=chunk)


def test_golden():
    errors = {name: FIXTURE.check(name, value) for name, value in parity.run(FIXTURE)}
    assert errors.keys() == FIXTURE.meta["outputs"].keys()


@pytest.mark.parametrize(
    "case, wrong", [("encode_1", "encoder.middle.1.proj.weight"), ("decode_1", "decoder.upsamples.11.resample.1.bias")]
)
def test_golden_notices_one_wrong_tensor(monkeypatch, case, wrong):
    true = reference.synthesize_tensor
    monkeypatch.setattr(
        reference, "synthesize_tensor", lambda key, *rest: true(key, *rest) * (1 + 0.01 * (key == wrong))
    )
    alone = Fixture(FIXTURE.folder)
    alone.meta["cases"] = {case: FIXTURE.meta["cases"][case]}
    with pytest.raises(AssertionError, match="exceeds"):
        alone.check(*next(parity.run(alone)))


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_decoding_a_stream_is_decoding_the_whole(params, whole, chunk):
    for length in range(1, len(LATENTS) + 1):
        pieces = list(vae.decode_stream(params, LATENTS[:length], THREE_LEVELS, chunk=chunk, pixels="float32"))
        assert [len(piece) for piece in pieces[:-1]] == ([1] + [4 * chunk] * len(pieces))[: len(pieces) - 1]
        frames = np.concatenate(pieces)
        assert frames.shape == (4 * length - 3, 12, 20, 3)
        np.testing.assert_allclose(frames, whole[0][: len(frames)], atol=1e-5)


def test_decoding_under_a_scan_is_decoding_the_whole(params, whole):
    frames = jax.jit(partial(vae.decode, config=THREE_LEVELS, chunk=2))(params, LATENTS[None, :6])  # 1, 2 + 2, 1
    np.testing.assert_allclose(frames[0], whole[0][:21], atol=1e-5)


def test_encoding_in_chunks_is_encoding_the_whole(params, whole):
    encoder = jax.jit(vae.Encoder(THREE_LEVELS).apply)
    moments, state = encoder({"params": params["encoder"]}, VIDEO[:, :1], None)
    parts, at = [moments], 1
    for frames in (4, 8, 4, 8):
        moments, state = encoder({"params": params["encoder"]}, VIDEO[:, at : at + frames], state)
        parts, at = [*parts, moments], at + frames
    mean, logvar = np.split(np.concatenate(parts, axis=1), 2, axis=-1)
    mean = (mean - THREE_LEVELS.latent_mean) / THREE_LEVELS.latent_std
    np.testing.assert_allclose(mean, whole[1][0], atol=1e-5)
    np.testing.assert_allclose(logvar, whole[1][1], atol=1e-5)


def test_encoding_uses_whole_groups_of_frames(params, whole):
    mean, logvar = jax.jit(partial(vae.encode, config=THREE_LEVELS, chunk=2))(params, VIDEO[:, :16])  # 1, 8, 4, not 3
    np.testing.assert_allclose(mean, whole[1][0][:, :4], atol=1e-5)
    np.testing.assert_allclose(logvar, whole[1][1][:, :4], atol=1e-5)


def test_a_stream_may_be_endless_and_come_in_any_pieces(params, whole):
    taken = []

    def forever():
        for i in itertools.count():
            taken.append(i)
            yield LATENTS[[i % 7]] if i < 7 else LATENTS

    stream = vae.decode_stream(params, forever(), THREE_LEVELS, chunk=1, pixels="float32")
    frames = np.concatenate([next(stream) for _ in range(5)])
    np.testing.assert_allclose(frames, whole[0][:17], atol=1e-5)
    assert len(taken) == 5  # no piece is asked for before the frames of the one before are out
    uneven = vae.decode_stream(params, iter(np.split(LATENTS, [2, 3])), THREE_LEVELS, chunk=2, pixels="float32")
    np.testing.assert_allclose(np.concatenate(list(uneven)), whole[0], atol=1e-5)


def test_memory_and_programs_do_not_grow_with_the_video(small):
    latents = np.random.default_rng(3).standard_normal((41, 4, 6, 4)).astype(np.float32)
    vae.decode_chunk.clear_cache()
    states, shapes = [], []
    for length in (3, 12, 41):
        for _ in vae.decode_stream(small, latents[:length], TWO_LEVELS, chunk=2):
            pass
        assert vae.decode_chunk._cache_size() == 2
    state = None
    for i in range(4):
        _, state = vae.decode_chunk(small, latents[None, [i]], state, config=TWO_LEVELS, pixels="uint8")
        states, shapes = [*states, state], [*shapes, jax.tree.map(lambda x: (x.shape, x.dtype), state)]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(leaf.is_deleted() for old in states[:-1] for leaf in jax.tree.leaves(old)), "the state is not donated"


def test_pixels_are_rounded_on_the_device(small):
    latents = np.random.default_rng(4).standard_normal((3, 4, 6, 4)).astype(np.float32) * 2
    exact = np.concatenate(list(vae.decode_stream(small, latents, TWO_LEVELS, pixels="float32")))
    assert exact.min() < -1 and exact.max() > 1, "there is something to clip"
    pixels = np.concatenate(list(vae.decode_stream(small, latents, TWO_LEVELS)))
    assert pixels.dtype == np.uint8 and pixels.shape == exact.shape
    assert np.abs(pixels - np.clip(exact / 2 + 0.5, 0, 1) * 255).max() < 0.501


def test_the_past_does_not_see_the_future(small):
    video = np.random.default_rng(5).uniform(-1, 1, (1, 9, 8, 12, 3)).astype(np.float32)
    later = video.copy()
    later[:, 5:] *= -1
    before, after = (through(small, x, TWO_LEVELS, None) for x in (video, later))
    first = np.abs(before[0] - after[0]).max(axis=(0, 2, 3, 4))
    assert first.shape == (5,) and (first > 0).tolist() == [False, False, False, True, True]
    np.testing.assert_array_equal(before[2][:, :5], after[2][:, :5])


def test_gradients(small):
    """Through both forms: finite, none forgotten, and as long as finite differences along them say."""
    video = np.random.default_rng(6).uniform(-1, 1, (2, 5, 8, 12, 3)).astype(np.float32)

    def loss(params):
        mean, logvar = vae.encode(params, video, TWO_LEVELS, chunk=None)
        out = vae.decode(params, mean, TWO_LEVELS, chunk=1)
        return jnp.mean(jnp.square(out - video)) + 0.1 * jnp.mean(jnp.square(mean) + jnp.square(logvar))

    loss = jax.jit(jax.value_and_grad(loss))
    small, gradient = jax.device_get((small, loss(small)[1]))
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    length = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    up, down = (loss(jax.tree.map(lambda p, g: p + step / length * g, small, gradient))[0] for step in (0.005, -0.005))  # noqa: B023
    assert (up - down) / 0.01 == pytest.approx(length, rel=0.01)


def test_gradient_of_a_grey_picture_is_finite():
    params = init(TWO_LEVELS, jax.random.key(0))  # no biases yet, so every feature is zero and so is its length
    gradient = jax.jit(jax.grad(lambda x: through(params, x, TWO_LEVELS, None)[0].sum()))(jnp.zeros((1, 1, 8, 8, 3)))
    assert np.isfinite(gradient).all()


def test_accelerators_take_another_form_to_the_same_numbers(small, monkeypatch):
    video = np.random.default_rng(7).uniform(-1, 1, (1, 5, 8, 12, 3)).astype(np.float32)
    trace = partial(through.__wrapped__, config=TWO_LEVELS, chunk=None)
    here = through(small, video, TWO_LEVELS, None)
    assert "name=_conv_on_cpu" in str(jax.make_jaxpr(lambda *x: trace(*x))(small, video))
    monkeypatch.setattr(mesh, "platform", lambda: "tpu")
    assert "name=_conv_on_cpu" not in str(jax.make_jaxpr(lambda *x: trace(*x))(small, video))
    there = jax.jit(lambda *x: trace(*x))(small, video)
    for ours, theirs in zip(here, there, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16_stays_close(small):
    video = np.random.default_rng(8).uniform(-1, 1, (1, 5, 8, 12, 3)).astype(np.float32)
    full = through(small, video, TWO_LEVELS, None)
    half = through(small, video, replace(TWO_LEVELS, dtype="bfloat16"), 1)
    for exact, rounded in zip(full, half, strict=True):
        assert rounded.dtype == jnp.float32
        error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("size", "chunk", "sizes"),
    [
        ((4, 5, 24, 32, 3), None, (2, 2, 2, 1)),
        ((1, 9, 24, 32, 3), 1, (2, 1, 4, 1)),
        ((1, 9, 20, 28, 3), 1, (2, 1, 4, 1)),
    ],
)
def test_same_numbers_on_a_mesh(small, size, chunk, sizes):
    """Several clips by their number; one, cut both ways, also where its columns do not divide."""
    video = np.random.default_rng(9).uniform(-1, 1, size).astype(np.float32)
    alone = through(small, video, TWO_LEVELS, chunk)
    devices = mesh.make_mesh(*sizes)
    with jax.set_mesh(devices):
        placed = jax.device_put(video, place_of(size, vae_layers.layout(len(video)), devices))
        spread = through(jax.device_put(small, partition(small, vae.AXES, devices)), placed, TWO_LEVELS, chunk)
    for ours, theirs in zip(spread, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_channel_norm_is_a_length():
    x = np.random.default_rng(10).standard_normal((2, 3, 5)).astype(np.float32)
    x[0, 0] = 0
    layer = vae_layers.ChannelNorm("float32")
    y = np.asarray(layer.apply(layer.init(jax.random.key(0), x), x))
    assert (y[0, 0] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1).reshape(-1)[1:], 5**0.5, rtol=1e-6)


def test_round_trip_is_exact():
    weights = FIXTURE.weights()
    config = vae.config_of(dict(FIXTURE.shapes()), FIXTURE.meta["config"])
    params = to_kavatar(weights, vae.TORCH, abstract(config), unused=vae.UNUSED)
    conv = weights["decoder.upsamples.4.residual.2.weight"]
    np.testing.assert_array_equal(params["decoder/level_1_block_0/conv1/kernel"][2, 1, 0], conv[:, :, 2, 1, 0].T)
    back = dict(to_torch(unflatten(params), vae.TORCH))
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[key], weights[key]) for key in weights)


def test_config_of_reads_the_shapes():
    published = VAEConfig(width=96, latent_channels=16, latent_mean=vae.LATENT_MEAN, latent_std=vae.LATENT_STD)
    shapes = reference_shapes(vae.TORCH, abstract(published))
    assert len(shapes) == 194
    assert sum(leaf.size for leaf in flatten(abstract(published)).values()) == 126_892_531
    assert vae.config_of(shapes, {}) == published
    other = replace(FOUR_LEVELS, multipliers=(1, 2, 3, 5), temporal=(True, False, True))
    named = {"latents_mean": STATISTICS["latent_mean"], "latents_std": list(STATISTICS["latent_std"])}
    assert vae.config_of(reference_shapes(vae.TORCH, abstract(other)), named) == other
    assert vae.config_of(reference_shapes(vae.TORCH, abstract(replace(TWO_LEVELS, blocks=2))), named).temporal == (
        True,
    )
    with pytest.raises(ValueError, match="4 latent channels, and latents_mean 16"):
        vae.config_of(reference_shapes(vae.TORCH, abstract(other)), {})
    with pytest.raises(ValueError, match="does not hold"):
        vae.config_of({"blocks.0.weight": (4, 4)}, {})


def test_fresh_parameters():
    params = flatten(init(replace(FOUR_LEVELS, width=16, param_dtype="bfloat16"), jax.random.key(0)))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in params.values())
    kernel = np.asarray(params["encoder/level_1_block_1/conv1/kernel"], np.float32)
    assert kernel.std() == pytest.approx((27 * 32) ** -0.5, rel=0.02)
    assert not np.array_equal(kernel, np.asarray(params["encoder/level_1_block_1/conv2/kernel"], np.float32))
    assert not params["decoder/middle/attention/project/kernel"].any()
    assert (params["decoder/norm_out/scale"] == 1).all() and not params["decoder/conv_out/bias"].any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: vae.encode({}, np.zeros((1, 5, 24, 36, 3)), FOUR_LEVELS), "36x24.*multiples of 8"),
        (lambda: next(vae.decode_stream({}, LATENTS, FOUR_LEVELS, chunk=0)), "chunk is 0"),
        (lambda: next(vae.decode_stream({}, LATENTS, FOUR_LEVELS, pixels="int8")), "'int8'"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_squares_of_pixels_fold_into_channels():
    video = jnp.arange(2 * 3 * 8 * 12 * 3, dtype=jnp.float32).reshape(2, 3, 8, 12, 3)
    folded = vae.fold(video, 4)
    assert folded.shape == (2, 3, 2, 3, 48)
    np.testing.assert_array_equal(folded[1, 2, 1, 2], video[1, 2, 4:8, 8:12].reshape(-1))
    np.testing.assert_array_equal(vae.unfold(folded, 4), video)


def test_a_folded_video_in_chunks_equals_the_whole():
    config = replace(TWO_LEVELS, patch=2)
    params, video = lively(config), VIDEO[:, :7]
    assert (config.side, config.stride) == (4, 2)
    mean, logvar, made = through(params, video, config, None)
    assert mean.shape == (1, 4, 3, 5, 4) and made.shape == video.shape
    for one, other in zip((mean, logvar, made), through(params, video, config, 1), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    with pytest.raises(ValueError, match="multiples of 4"):
        vae.encode(params, VIDEO[:, :, :10], config)


@pytest.mark.parametrize("config", [replace(TWO_LEVELS, patch=2, bypass=True), replace(THREE_LEVELS, bypass=True)])
def test_a_bypass_in_chunks_equals_the_whole(config):
    params, video = lively(config), VIDEO[:, :9]
    without = through(params, video, replace(config, bypass=False), None)
    for one, other, plain in zip(
        through(params, video, config, None), through(params, video, config, 1), without, strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-5)
        assert np.abs(one - plain).max() > 0.01


def test_a_bypass_alone_is_a_bypass_beside_networks_that_give_nothing():
    beside = replace(TWO_LEVELS, patch=2, bypass=True)
    alone, video = replace(beside, blocks=0), VIDEO[:, :9]
    params = lively(beside)
    params["encoder"]["quant"], params["decoder"]["conv_out"] = jax.tree.map(
        jnp.zeros_like, (params["encoder"]["quant"], params["decoder"]["conv_out"])
    )
    bare = {name: {"bypass": part["bypass"]} for name, part in params.items()}
    assert jax.tree.structure(bare) == jax.tree.structure(vae.init(alone, jax.random.key(0)))
    latents, _, made = whole = through(bare, video, alone, None)
    for one, other in zip(whole, through(params, video, beside, None), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    streamed = vae.decode_stream(bare, np.asarray(latents)[0], alone, chunk=2, pixels="float32")
    np.testing.assert_allclose(np.concatenate(list(streamed)), np.asarray(made)[0], atol=1e-6)
    with pytest.raises(ValueError, match="nothing is left"):
        replace(alone, bypass=False)


def test_pixels_of_a_latent_are_gathered_and_scattered():
    config = replace(TWO_LEVELS, patch=2)  # two frames of four by four pixels
    video = jnp.arange(2 * 5 * 8 * 12 * 3, dtype=jnp.float32).reshape(2, 5, 8, 12, 3)
    cells = vae.gather(video, config, starts=True)
    assert cells.shape == (2, 3, 2, 3, 96)
    np.testing.assert_array_equal(cells[1, 2, 1, 2].reshape(2, 4, 4, 3), video[1, 3:, 4:, 8:])
    np.testing.assert_array_equal(cells[0, 0, 0, 0].reshape(2, 4, 4, 3), video[0, [0, 0], :4, :4])
    np.testing.assert_array_equal(vae.scatter(cells, config, starts=True), video)
    np.testing.assert_array_equal(vae.scatter(cells[:, 1:], config, starts=False), video[:, 1:])
