"""Streaming: the wave gives what lock-step gives, whatever comes of the speech and however it comes."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import demo
from kavatar_jax.cascade import performance
from kavatar_jax.cascade.blueprint import draw_blueprint, plan_windows
from kavatar_jax.cascade.encode import encode
from kavatar_jax.cascade.stitch import decode
from kavatar_jax.cascade.weights import draw_untrained
from kavatar_jax.config import set_fields
from kavatar_jax.diffusion.solver import advance, begin, plan_of
from kavatar_jax.diffusion.wavefront import Wave, begin_level, pass_level
from kavatar_jax.diffusion.windows import Windows, fuse, fusion_weights, overlap_ramp
from kavatar_jax.director.rules import direct, direct_unheard
from kavatar_jax.media.text import ByteTokenizer
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.types import SAMPLE_RATE, silent
from tests.tones import make_request


@pytest.fixture(scope="module")
def config():
    return demo.tiny()


@pytest.fixture(scope="module")
def weights(config):
    return draw_untrained(config, 0, ByteTokenizer())


def make_conditions(config, weights, seconds, director=direct_unheard):
    request = make_request(config, seconds, beat=0.7)
    return encode(request, director(request), weights, config, silent)


def in_pieces(samples, size):
    return (samples[i : i + size] for i in range(0, len(samples), size))


def toy_velocity(x, sigma, number):
    """Of one window, from all of its frames, its number and the noise level: nothing that a mistake would leave alone."""
    return np.tanh(x + x.mean(axis=0)) * sigma + np.cos(number + np.arange(len(x)))[:, None]


@pytest.mark.parametrize(
    "solver, fusion, stride, count, group",
    [
        ("euler", "log", 6, 7, 1), ("unipc", "uniform", 6, 8, 3), ("dpm++", "none", 6, 7, 2),  # each reaches one neighbour
        ("unipc", "log", 3, 7, 2), ("dpm++", "fixed", 3, 6, 1),  # two
        ("unipc", "log", 4, 5, 8), ("euler", "none", 8, 3, 2),  # more windows a call than there are; no overlap
    ],
)  # fmt: skip
def test_a_wave_equals_lock_step(solver, fusion, stride, count, group):
    sampling = set_fields(demo.tiny(), [f"sampling.solver={solver}", "sampling.steps=5"]).sampling
    length, plan, ramp = 8, plan_of(sampling), overlap_ramp(8 - stride, fusion)
    windows = Windows((count - 1) * stride + length, length, stride, count)
    video = np.random.default_rng(0).standard_normal((200, 3))

    def noise(starts):
        return video[100 + np.asarray(starts)[:, None] + np.arange(length)].astype(np.float32)

    history = begin(noise(windows.starts), plan)
    for move in plan.moves:
        velocity = np.stack([toy_velocity(x, move.sigma, k) for k, x in enumerate(history.x)])
        history = advance(history, fuse(jax.numpy.asarray(velocity), fusion_weights(windows, ramp), stride), move)
    expected = windows.join(history.x)

    wave, levels, out, calls = Wave(length, stride, group, len(plan.moves)), None, [], 0
    for front in range(0, count + wave.levels * wave.reach, group):
        block = begin(noise(stride * (front + np.arange(group))), plan)
        levels = levels or [begin_level(block, wave) for _ in plan.moves]
        for i, move in enumerate(plan.moves):
            first = wave.first(front, i)
            calls += 0 < first + group and first < count
            velocity = np.stack([toy_velocity(np.asarray(x), move.sigma, first + j) for j, x in enumerate(block.x)])
            # that more windows follow is not known before they come
            fusion_of = wave.weights(first, min(count, front + group), ramp)
            levels[i], block = pass_level(levels[i], block, velocity, fusion_of, move, wave)
        done = wave.first(front, wave.levels)
        out += [(k, block.x[k - done]) for k in range(done, done + group) if 0 <= k < count]
    assert [k for k, _ in out] == list(range(count))
    np.testing.assert_allclose(windows.join(np.stack([x for _, x in out])), expected, atol=2e-5)
    assert calls <= wave.levels * (-(-count // group) + (wave.reach > 0))


@pytest.mark.parametrize(
    "seconds, size, group, fields",
    [
        (3.3, 700, 1, []),
        (4.0, 10**6, 2, ["sampling.solver=unipc", "sampling.steps=4", "sampling.fusion=uniform", "sampling.overlap=3"]),
        (3.0, 5000, 2, ["sampling.solver=dpm++", "sampling.steps=3", "sampling.overlap=4", "sampling.fusion=none"]),
        (2.5, 160, 1, ["sampling.overlap=0"]),
        pytest.param(
            1.7,
            9999,
            4,
            ["sampling.guided=(0.0, 0.9)", "sampling.steps=3", "sampling.frame_scale=1.5"],
            marks=pytest.mark.slow,
        ),
        (4.0, 3000, 1, ["speech.memory=70"]),
    ],
)
def test_speech_in_pieces_gives_what_the_whole_speech_gives(config, weights, seconds, size, group, fields):
    config = set_fields(config, fields)
    conditions = make_conditions(config, weights, seconds, direct)
    expected = draw_blueprint(conditions, weights, config, silent).latents
    pieces = in_pieces(conditions.speech, size)
    unheard = dataclasses.replace(conditions, speech=np.zeros(0, np.float32))
    latents = list(performance.perform(unheard, pieces, weights, config, group=group, report=silent))
    latents = np.concatenate(latents)[: len(expected)]
    np.testing.assert_allclose(latents, expected, atol=2e-5 * np.abs(expected).max())


def test_a_span_needs_no_more_speech_than_it_depends_on(config, weights):
    """Frames are out when their window and one more for each step have been heard, and no sample later."""
    conditions, heard = make_conditions(config, weights, 4.0), [0]

    def one_by_one():
        for piece in in_pieces(conditions.speech, 160):
            heard[0] += len(piece)
            yield piece

    windows = plan_windows(len(conditions.speech), config)
    spans = performance.perform(conditions, one_by_one(), weights, config, group=1, report=silent)
    for k, _ in zip(range(windows.count - config.sampling.steps), spans, strict=False):
        last = k + config.sampling.steps
        end = (4 * windows.stride * last + config.sampling.window_frames) * SAMPLE_RATE / config.fps
        assert 0 <= heard[0] - min(end, len(conditions.speech)) < 160, (k, heard[0], end)


def test_one_program_whatever_the_length(config, weights):
    def play(seconds):
        conditions = make_conditions(config, weights, seconds)
        spans = performance.perform(conditions, [conditions.speech], weights, config, group=1, report=silent)
        return sum(map(len, spans)), performance._pass._cache_size()

    (short, programs), (long, as_many) = play(2.0), play(6.0)
    assert long > 2 * short and programs == as_many


def test_no_speech_is_an_error(config, weights):
    conditions = make_conditions(config, weights, 0.2)
    with pytest.raises(ValueError, match="empty"):
        next(performance.perform(conditions, [], weights, config, group=1, report=silent))


def test_frames_do_not_wait_for_the_next_span(config, weights):
    """A decoder that is given a span gives all of its frames before it asks for another."""
    latents = np.random.default_rng(0).standard_normal((5, 4, 6, 16), np.float32)
    asked = []

    def spans():
        for i, span in enumerate((latents[:2], latents[2:3], latents[3:])):
            asked.append(i)
            yield span

    seen = {}
    for number, _ in enumerate(decode(spans(), weights, config)):
        seen[number] = len(asked)
    assert [seen[n] for n in (4, 5, 8, 9, 16)] == [1, 2, 2, 3, 3]


def test_a_wave_over_eight_devices_equals_one(config, weights):
    conditions = make_conditions(config, weights, 9.0)
    expected = draw_blueprint(conditions, weights, config, silent).latents
    mesh = make_mesh(4, 2)
    spread = dataclasses.replace(weights, **{
        name: jax.device_put(getattr(weights, name), jax.NamedSharding(mesh, jax.P()))
        for name in ("dit", "vae", "text", "image", "speech")
    })  # fmt: skip
    with jax.set_mesh(mesh):
        spans = performance.perform(conditions, [conditions.speech], spread, config, group=8, report=silent)
        latents = np.concatenate(list(spans))[: len(expected)]
    np.testing.assert_allclose(latents, expected, atol=2e-5 * np.abs(expected).max())
