"""The cascade on the tiny config: what windows hear and see, how many frames come out, one program, eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from kavatar_jax.cascade import denoise as denoising
from kavatar_jax.cascade.blueprint import at_blueprint_size, plan_windows, see, share, tell_windows
from kavatar_jax.cascade.denoise import denoise, draw_noise
from kavatar_jax.cascade.encode import encode
from kavatar_jax.cascade.hear import hear, plan_latents, spans_of_windows
from kavatar_jax.cascade.keyframes import _best_path, pick_keyframes
from kavatar_jax.cascade.pipeline import generate, generate_in_one_pass
from kavatar_jax.cascade.weights import draw_untrained
from kavatar_jax.config import set_fields
from kavatar_jax.diffusion import guidance
from kavatar_jax.director.rules import direct
from kavatar_jax.media.text import ByteTokenizer
from kavatar_jax.media.wear import wear
from kavatar_jax.models import vae
from kavatar_jax.models.audio_adapter import ABSENT, NEIGHBOURS, SILENCE
from kavatar_jax.models.components import model_of
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.types import SAMPLE_RATE, Blueprint, silent
from tests.tones import make_request


@pytest.fixture(scope="module")
def config():
    return demo.tiny()


@pytest.fixture(scope="module")
def weights(config):
    return draw_untrained(config, 0, ByteTokenizer())


def run(make, request, weights, config):
    video = make(request, direct, weights, config)
    frames = np.stack(list(video.images))
    assert len(frames) == video.frames and frames.dtype == np.uint8
    return frames


@pytest.mark.parametrize("fps", [24, 25, 30])
@pytest.mark.parametrize("seconds", [0.3, 0.9, 3.24, 5.0])
def test_every_latent_frame_hears_its_own_frames(config, weights, fps, seconds):
    config = dataclasses.replace(config, fps=fps)
    samples = make_request(config, seconds).speech.samples
    windows = plan_windows(len(samples), config)
    spans = spans_of_windows(windows, len(samples), fps, config.sampling)
    _, slices = hear(samples, spans, weights.speech, config)
    for k in range(windows.count):
        assert spans[k, 0] == round(4 * windows.starts[k] * SAMPLE_RATE / fps)
        for i in range(windows.length):
            latent = int(windows.starts[k]) + i
            if i == 0 and k > 0:  # a window's first latent stands for one frame to the model
                first = last = 4 * latent
            else:
                first, last = max(4 * latent - 3, 0), 4 * latent
            row = slices[k, i][slices[k, i] >= 0]
            heard = spans[k, 0] / SAMPLE_RATE + row * 0.02
            # to within one token of 20 ms, which is as far as the encoder may end before its samples do
            assert heard[0] <= first / fps + 0.02 and heard[-1] + 0.045 >= (last + 1) / fps
            # and hardly more than the neighbours that widen every slice
            assert heard[-1] - (last + 1) / fps < (NEIGHBOURS + 3) * 0.02


@pytest.mark.parametrize("speech", [None, demo.config().speech])
def test_an_encoder_with_a_memory_hears_what_came_before(config, weights, speech):
    """The window's sound and the memory's before it, silence before the beginning; and the frames read the same tokens."""
    config = dataclasses.replace(config, speech=dataclasses.replace(speech or config.speech, memory=40))
    module = model_of("speech", config.speech)
    params = weights.speech if speech is None else module.init(config.speech, jax.random.key(0))
    samples = make_request(config, 3.0, beat=0.7).speech.samples
    windows = plan_windows(len(samples), config)
    spans = spans_of_windows(windows, len(samples), 25, config.sampling)
    features, slices = hear(samples, spans, params, config)
    forgetful = dataclasses.replace(config, speech=dataclasses.replace(config.speech, memory=0))
    alone, same = hear(samples, spans, params, forgetful)
    np.testing.assert_array_equal(slices, same)
    assert config.memory_samples == 40 * 320 and features.shape == alone.shape
    for k, (start, end) in enumerate(spans[: windows.count]):
        heard = samples[max(start - 12800, 0) : end]
        silence = max(12800 - start, 0), max(end - len(samples), 0)
        whole = module.listen(params, np.pad(module.normalise(heard), silence)[None], forgetful.speech)[0]
        np.testing.assert_allclose(features[k, : len(whole) - 40], whole[40:], atol=2e-4)  # of size one
        assert np.abs(features[k] - alone[k]).max() > 0.01


def test_released_windows_hear_84_frames_and_the_last_what_is_left(config, weights):
    config = set_fields(config, ["sampling.indexing=released"])
    samples = make_request(config, 3.0).speech.samples
    windows = plan_windows(len(samples), config)
    spans = spans_of_windows(windows, len(samples), 25, config.sampling)
    assert (np.diff(spans[: windows.count - 1], axis=1) == 640 * 4 * windows.length).all()
    assert spans[windows.count - 1, 1] == len(samples)
    _, slices = hear(samples, spans, weights.speech, config)
    assert ABSENT in slices[windows.count - 1] and SILENCE in slices[0]


@pytest.mark.parametrize("fps", [24, 25, 30])
def test_no_frame_is_lost_in_planning(config, fps):
    for samples in [1, 300, 8000, 51_200, 51_840, 54_400, 80_000, 3_745_760]:
        frames, latents = plan_latents(samples, fps, config.sampling)
        assert frames == max(1, round(samples / SAMPLE_RATE * fps))
        assert latents == 2 or 4 * (latents - 2) + 1 < frames
        assert frames <= 4 * (latents - 1) + 1


@pytest.mark.parametrize("seconds", [0.02, 3.3])
@pytest.mark.parametrize("make", [generate, generate_in_one_pass])
def test_as_many_frames_as_speech(make, seconds, weights, config):
    request = make_request(config, seconds)
    frames = run(make, request, weights, config)
    assert frames.shape == (max(1, round(seconds * config.fps)), config.height, config.width, 3)
    assert frames.std() > 1


def test_the_same_seed_gives_the_same_video(weights, config):
    one, two, other = (run(generate, make_request(config, 1.2, seed=seed), weights, config) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_every_branch_of_native_guidance_hears_its_own(weights, config):
    conditions = encode(request := make_request(config, 1.0), direct(request), weights, config, silent)
    windows, told, shared = tell_windows(conditions, weights, config)
    x, told = draw_noise(0, windows, config)[:1], jax.tree.map(lambda leaf: leaf[:1], told)
    run_branches = jax.jit(denoising.branch_velocities, static_argnums=(3, 4))

    def velocities(branches, told=told):
        return run_branches(weights.dit, 500.0, shared, config.dit, branches, x, told)[:, 0]

    native = velocities(guidance.audio_native(1.0, 1.0))
    (spoken,) = velocities(guidance.text_and_audio(1.0, 1.0))
    (without,) = velocities(guidance.text_and_audio(1.0, 1.0), told._replace(speech=jnp.zeros_like(told.speech)))
    (deaf,) = velocities((guidance.Branch(positive=True, heard=False, weight=1.0),))
    np.testing.assert_allclose(native, jnp.stack([spoken, without, deaf]), atol=1e-5)
    assert np.abs(spoken - without).max() > 1e-3 < np.abs(without - deaf).max()


def test_the_negative_frame_is_worn_in_latents_and_tokens(weights, config):
    """Every branch of a full set, in one batch, is what it is alone; the worn one what a worn portrait gives."""
    fields = ["sampling.frame_scale=1.5", "sampling.native=(1.0, 1.0)", "sampling.audio_attention=1.5"]
    guided = set_fields(config, fields)
    request = make_request(config, 1.0)
    suffered = dataclasses.replace(request, portrait=wear(request.portrait))
    run_branches = jax.jit(denoising.branch_velocities, static_argnums=(3, 4))

    def velocities(request, config, branches):
        conditions = encode(request, direct(request), weights, config, silent)
        windows, told, shared = tell_windows(conditions, weights, config)
        x, told = draw_noise(0, windows, config)[:1], jax.tree.map(lambda leaf: leaf[:1], told)
        return shared, run_branches(weights.dit, 500.0, shared, config.dit, branches, x, told)[:, 0]

    branches = guidance.branches_of(guided.sampling)
    assert [branch.worn for branch in branches] == [False, False, False, True]
    shared, together = velocities(request, guided, branches)
    plain_shared, plain = velocities(request, config, branches[:-1])
    worn_shared, (worn,) = velocities(suffered, config, (branches[-1]._replace(worn=False),))
    np.testing.assert_allclose(together, [*plain, worn], atol=1e-5 * np.abs(worn).max())
    assert np.abs(plain[0] - worn).max() > 0.01 * np.abs(worn).max()
    assert plain_shared.worn is None
    for name in ("image", "condition"):
        np.testing.assert_array_equal(getattr(shared, name), getattr(plain_shared, name))
        np.testing.assert_array_equal(getattr(shared.worn, name), getattr(worn_shared, name))
        assert np.abs(getattr(shared.worn, name) - getattr(shared, name)).max() > 1e-2


def test_guidance_by_frame_and_attention_changes_the_video_unless_it_is_off(weights, config):
    request = make_request(config, 1.2)
    plain, off, on = (
        run(generate, request, weights, set_fields(config, fields))
        for fields in (
            [], ["sampling.frame_scale=1", "sampling.audio_attention=1"],
            ["sampling.frame_scale=1.5", "sampling.audio_attention=1.5"],
        )
    )  # fmt: skip
    np.testing.assert_array_equal(off, plain)
    assert (on != plain).any()


def test_every_picture_that_a_clip_is_given_is_worn(weights, config):
    config = set_fields(config, ["sampling.frame_scale=2"])
    request = make_request(config, 1.0)
    conditions = encode(request, direct(request), weights, config, silent)
    first, last = request.portrait, request.portrait[::-1]
    views = [{0: first}, {0: first, 12: last}]
    shared = share(conditions, views, weights, config)
    np.testing.assert_array_equal(shared.condition, see(views, weights, config))
    worn = see([{0: wear(first)}, {0: wear(first), 12: wear(last)}], weights, config)
    np.testing.assert_array_equal(shared.worn.condition, worn)
    np.testing.assert_array_equal(shared.worn.condition[..., :4], shared.condition[..., :4])


def test_guidance_may_be_for_some_noise_levels_only(weights, config):
    request = make_request(config, 1.0)
    frames = {
        fields: run(generate_in_one_pass, request, weights, set_fields(config, ["sampling.steps=3", *fields]))
        for fields in [
            ("sampling.guided=(0.0, 0.0)",), ("sampling.text_scale=1", "sampling.audio_scale=1"),
            (), ("sampling.guided=(0.95, 1.0)",),
        ]
    }  # fmt: skip
    never, plain, always, first = frames.values()
    np.testing.assert_array_equal(never, plain)
    assert (always != plain).any() and (first != plain).any() and (first != always).any()


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_windows_agree_where_they_overlap_whatever_the_solver_remembers(weights, config, solver):
    config = set_fields(config, [f"sampling.solver={solver}", "sampling.steps=4", "sampling.overlap=3"])
    conditions = encode(request := make_request(config, 2.0), direct(request), weights, config, silent)
    windows, told, shared = tell_windows(conditions, weights, config)
    noise, steps = draw_noise(0, windows, config), []
    latents = denoise(
        weights.dit,
        noise,
        told,
        shared,
        windows,
        config.dit,
        config.sampling,
        stage="",
        report=lambda *a: steps.append(a),
    )
    assert windows.count > 1 and len(steps) == 4
    scale = np.abs(latents).max()
    for k in range(windows.count - 1):
        np.testing.assert_allclose(latents[k + 1, :3], latents[k, -3:], atol=1e-5 * scale)
    assert np.abs(latents[1, 3:6] - latents[0, -3:]).max() > 0.1 * scale


def test_one_program_serves_two_lengths(weights, config):
    lengths = 2.9, 3.2
    counts = [plan_windows(int(seconds * SAMPLE_RATE), config) for seconds in lengths]
    assert counts[0].total != counts[1].total and counts[0].slots == counts[1].slots
    mesh = make_mesh(1, devices=jax.devices()[:1])
    sample(make_request(config, lengths[0]), weights, config, mesh)
    programs = denoising.step._cache_size()
    sample(make_request(config, lengths[1]), weights, config, mesh)
    assert denoising.step._cache_size() == programs


def sample(request, weights, config, mesh):
    with jax.set_mesh(mesh):
        conditions = encode(request, direct(request), weights, config, silent)
        windows, told, shared = tell_windows(conditions, weights, config)
        noise = draw_noise(0, windows, config)
        latents = denoise(
            weights.dit, noise, told, shared, windows, config.dit, config.sampling, stage="", report=silent
        )
        return windows.join(latents)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), pytest.param((2, 2, 1, 2), marks=pytest.mark.slow)])
def test_windows_over_eight_devices_equal_one(weights, config, sizes):
    request = make_request(config, 5.0)
    mesh = make_mesh(*sizes)
    one = sample(request, weights, config, make_mesh(1, devices=jax.devices()[:1]))
    spread = dataclasses.replace(weights, **{
        name: jax.device_put(getattr(weights, name), jax.NamedSharding(mesh, jax.P()))
        for name in ("dit", "vae", "text", "image", "speech")
    })  # fmt: skip
    many = sample(request, spread, config, mesh)
    assert one.shape[0] == plan_latents(len(request.speech.samples), config.fps, config.sampling)[1]
    np.testing.assert_allclose(many, one, atol=2e-5 * np.abs(one).max())


def test_a_longer_speech_does_not_change_the_noise_before_it(config):
    windows = [plan_windows(int(seconds * SAMPLE_RATE), config) for seconds in (1.0, 4.0)]
    short, long = (draw_noise(7, w, config) for w in windows)
    np.testing.assert_array_equal(short, long[: len(short)])
    assert (draw_noise(8, windows[0], config) != short).all()


def test_masks_of_first_and_last_frame(weights, config):
    red = np.zeros((config.height, config.width, 3), np.uint8)
    shown = see([{0: red}, {0: red, 12: red + 200}], weights, config)
    mask = shown[..., 0, 0, :4]
    np.testing.assert_array_equal(mask[:, 0], np.ones((2, 4)))
    np.testing.assert_array_equal(mask[0, 1:], 0)
    np.testing.assert_array_equal(mask[1, 3], [0, 0, 0, 1])
    np.testing.assert_array_equal(mask[1, [1, 2, 4, 5]], 0)
    # causal: what is shown later leaves earlier latents alone
    np.testing.assert_allclose(shown[0, :3], shown[1, :3], atol=1e-5)
    assert np.abs(shown[0, 3] - shown[1, 3]).max() > 1e-3


def test_a_later_frame_is_held_where_the_reference_is_shown_in_every_frame(weights, config):
    """The latent of the last frame alone, among grey, is like that of no video; the held one is like a still's."""
    grey, bright = (np.full((config.height, config.width, 3), level, np.uint8) for level in (60, 190))
    still = dataclasses.replace(config, dit=dataclasses.replace(config.dit, reference="every"))
    frames = config.sampling.window_frames
    held, alone = (see([{0: grey, frames - 1: bright}], weights, c)[0, -1, ..., 4:] for c in (still, config))
    video = np.full((1, frames, config.height, config.width, 3), 60 / 127.5 - 1, np.float32)
    video[:, 1:-4] = 0
    video[:, -4:] = 190 / 127.5 - 1
    expected = np.asarray(vae.encode(weights.vae, jnp.asarray(video), config.vae)[0])[0, -1]
    np.testing.assert_allclose(held, expected, atol=1e-4)
    assert np.abs(held - alone).max() > 1e-2


def test_keyframes_lie_on_the_grid_and_windows_reach_between_them(weights, config):
    request = make_request(config, 4.0)
    storyline = direct(request)
    conditions = encode(request, storyline, weights, config, silent)
    small = at_blueprint_size(config)
    latents = np.random.default_rng(0).standard_normal((26, small.height // 8, small.width // 8, 16), np.float32)
    blueprint = Blueprint(latents=latents, frames=100, width=small.width, height=small.height)
    keyframes = pick_keyframes(blueprint, storyline, conditions, weights, config, silent)
    cuts = np.array(keyframes.cuts)
    assert cuts[0] == 0 and cuts[-1] == 100
    assert (np.diff(cuts) % 4 == 0).all() and np.diff(cuts).min() >= 4
    assert np.diff(cuts).max() <= config.sampling.window_frames - 1
    assert keyframes.images.shape == (len(cuts), config.height, config.width, 3)
    np.testing.assert_array_equal(keyframes.images[0], request.portrait)


def test_the_best_path_gives_up_a_better_frame_where_a_window_would_not_reach():
    worth = [{0: 0.0}, {8: 1.0, 12: 0.9}, {28: 0.0, 32: 0.0}]
    assert _best_path(worth, 20) == [0, 12, 32] or _best_path(worth, 20) == [0, 8, 28]
    assert _best_path(worth, 20)[1] == 8
    worth[2] = {32: 0.0}
    assert _best_path(worth, 20) == [0, 12, 32]
