"""Steps that reuse what the blocks added: which ones, that they do no work in the blocks, and that a wave does the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import soundfile

from configs import demo
from kavatar_jax.cascade import denoise as denoising
from kavatar_jax.cascade import performance
from kavatar_jax.cascade.blueprint import draw_blueprint, tell_windows
from kavatar_jax.cascade.encode import encode
from kavatar_jax.cascade.weights import draw_untrained
from kavatar_jax.config import CacheConfig, Magnitudes, set_fields
from kavatar_jax.diffusion.caching import NO_REUSE, Reuse, name_of, plan_reuse, read_cache
from kavatar_jax.diffusion.flow import sampling_sigmas
from kavatar_jax.diffusion.guidance import Branch, branches_of, text_and_audio
from kavatar_jax.director.rules import direct
from kavatar_jax.media.text import ByteTokenizer
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.types import SAMPLE_RATE, silent
from tests.tones import make_request
from tools import calibrate_cache
from tools.benchmarks.hlo import cost_of

LEVELS = tuple(float(level) for level in sampling_sigmas(5, 1.0, double_shift=False)[:-1])
NOTHING, HEARD, TOLD = "nothing", "heard", "positive heard"
BRANCHES = text_and_audio(3.0, 5.0)


def cache_of(threshold, *, longest=2, start=0.0, **values):
    names = {"nothing": NOTHING, "heard": HEARD, "told": TOLD}
    flat = dict.fromkeys(names, (1.0,) * len(LEVELS))
    magnitudes = [Magnitudes(branch=names[key], sigmas=LEVELS, values=each) for key, each in (flat | values).items()]
    return CacheConfig(threshold=threshold, longest=longest, start=start, magnitudes=tuple(magnitudes))


def rows(reuses):
    """By branch, a step each: . where it reuses."""
    return ["".join("." if name in reuse.reused else "#" for reuse in reuses) for name in (NOTHING, HEARD, TOLD)]


def plan(cache, steps=5, branches=BRANCHES):
    levels = np.interp(np.linspace(0, 4, steps), np.arange(5), LEVELS)
    return plan_reuse(np.append(levels, 0), [branches] * steps, cache)


def test_errors_are_summed_up_since_the_last_full_step():
    """Quotients to the last full step 0.95 and 0.9: errors 0.05 and 0.15, then anew."""
    falling = (1.0, 0.95, 0.9, 0.855, 0.81)
    assert rows(plan(cache_of(0.04, told=falling)))[2] == "#####"
    assert rows(plan(cache_of(0.1, told=falling)))[2] == "#.#.#"
    assert rows(plan(cache_of(0.16, told=falling)))[2] == "#..#."
    assert rows(plan(cache_of(9.0, told=falling, longest=3)))[2] == "#...#"


def test_a_start_is_kept_and_branches_have_schedules_of_their_own():
    assert rows(plan(cache_of(0.1, start=0.6))) == ["###.."] * 3
    assert rows(plan(cache_of(0.1, longest=1, heard=(1.0, 2.0, 3.0, 3.0, 5.0)))) == ["#.#.#", "###.#", "#.#.#"]
    assert plan(cache_of(0.1, longest=1))[3:] == [
        Reuse((HEARD, NOTHING, TOLD), ()),
        Reuse((), ()),
    ]


def test_what_is_kept_is_reused_later():
    guided, plain = BRANCHES, text_and_audio(1.0, 1.0)
    reuses = plan_reuse(np.array([1.0, 0.8, 0.6, 0.4, 0]), [guided, plain, plain, guided], cache_of(0.1, longest=1))
    assert reuses == [
        Reuse((), (HEARD, NOTHING, TOLD)),
        Reuse((TOLD,), (HEARD, NOTHING)),
        Reuse((), (HEARD, NOTHING, TOLD)),
        Reuse((HEARD, NOTHING, TOLD), ()),
    ]


def test_quotients_of_any_number_of_steps_come_from_the_same_curve():
    falling = (1.0, 0.9, 0.8, 0.7, 0.6)
    assert rows(plan(cache_of(0.12, told=falling), steps=9))[2] == "#.#.#.#.#"
    assert rows(plan(cache_of(9.0), steps=9))[0] == "#..#..#.."


def test_levels_that_were_not_measured_are_computed_in_full():
    reuses = plan_reuse(np.array([1.0, 0.5, LEVELS[-1] / 2, LEVELS[-1] / 3, 0]), [BRANCHES] * 4, cache_of(9.0))
    assert rows(reuses) == ["#.##"] * 3


def test_off_is_the_default_and_branches_must_be_known():
    assert plan(CacheConfig()) == [NO_REUSE] * 5
    with pytest.raises(ValueError, match="'positive heard silent', only of nothing, heard"):
        plan(cache_of(0.1), branches=(Branch(True, True, 1.0, silent=True),))


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"threshold": -1.0}, "at least 0"),
        ({"longest": 0}, "at least 1"),
        ({"start": 1.5}, "share of the steps"),
        ({"threshold": 0.1}, "give --cache FILE"),
        ({"magnitudes": [{"branch": "x", "sigmas": [1.0], "values": []}]}, "one number above 0"),
        ({"magnitudes": [{"branch": "x", "sigmas": [0.5, 1.0], "values": [1.0, 1.0]}]}, "do not fall"),
        ({"magnitude": 1}, "unexpected keyword"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, fields, complaint):
    path = tmp_path / "cache.json"
    path.write_text(json.dumps({"magnitudes": []} | fields))
    with pytest.raises(ValueError, match=complaint) as error:
        read_cache(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        read_cache(tmp_path / "other.json")


@pytest.fixture(scope="module")
def config():
    return set_fields(demo.tiny(), ["sampling.steps=5", "sampling.shift=1"])


@pytest.fixture(scope="module")
def weights(config):
    return draw_untrained(config, 0, ByteTokenizer())


def cached(config, cache):
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, cache=cache))


def mixed(threshold=0.1):
    """A cache of which every branch does something else; branches are full at the levels 5 4, 5 3 1 and 5 4 2."""
    return cache_of(threshold, nothing=(1.0, 1.5, 1.5, 1.5, 1.5), heard=(1.0, 1.0, 2.0, 2.0, 4.0),
                    told=(1.0, 2.0, 2.0, 4.0, 4.0))  # fmt: skip


def draw(config, weights, seconds=2.5):
    request = make_request(config, seconds)
    conditions = encode(request, direct(request), weights, config, silent)
    return draw_blueprint(conditions, weights, config, silent).latents


def test_a_threshold_of_zero_changes_no_bit(config, weights):
    expected = draw(config, weights)
    programs = denoising.step._cache_size()
    np.testing.assert_array_equal(draw(cached(config, mixed(0.0)), weights), expected)
    assert denoising.step._cache_size() == programs


def test_what_repeats_may_be_reused(config, weights):
    """Blocks that add their biases, whatever comes in and whenever: with and without reuse it is the same video."""
    rng = np.random.default_rng(0)

    def constant(path, leaf):
        name = "/".join(key.key for key in path)
        if name.startswith("time/modulation") or name in ("blocks/self_attn/o/kernel", "blocks/cross_attn/o/kernel"):
            return np.zeros_like(leaf)
        if name.startswith("blocks") and name.endswith("o/bias"):
            return rng.standard_normal(leaf.shape).astype(leaf.dtype)
        return np.zeros_like(leaf) if name == "blocks/down/kernel" else leaf

    same = dataclasses.replace(weights, dit=jax.tree_util.tree_map_with_path(constant, weights.dit))
    expected = draw(config, same)
    assert np.abs(expected - draw(config, weights)).max() > 0.1
    np.testing.assert_allclose(draw(cached(config, mixed()), same), expected, atol=2e-5 * np.abs(expected).max())


def test_as_many_branches_go_through_the_blocks_as_planned(config, weights, monkeypatch):
    ran, step = [], denoising.step

    def counted(*arguments, branches, reuse, **options):
        ran.append(len(branches) - len(reuse.reused))
        return step(*arguments, branches=branches, reuse=reuse, **options)

    monkeypatch.setattr(denoising, "step", counted)
    config = cached(config, mixed())
    assert rows(plan(config.sampling.cache)) == ["##..#", "#.#.#", "##.#."]
    reused = draw(config, weights)
    assert ran == [3, 2, 1, 1, 2]
    assert np.isfinite(reused).all()


def test_blocks_that_are_skipped_are_not_in_the_program(config, weights):
    """Nor is the audio adapter, which only they read; and nothing of the blocks' weights reaches the result."""
    request = make_request(config, 1.0)
    conditions = encode(request, direct(request), weights, config, silent)
    windows, told, shared = tell_windows(conditions, weights, config)
    steps = denoising.plan_steps(config.sampling)
    names = tuple(name_of(branch) for branch in steps[1].branches)
    keeping = [steps[0]._replace(reuse=Reuse(kept=names)), steps[1]]
    noise = denoising.draw_noise(0, windows, config)
    history, residuals = next(
        denoising.take_steps(weights.dit, noise, told, shared, windows, config.dit, config.sampling, keeping)
    )
    history = jax.tree.map(np.asarray, history)  # on the host, so that a step does not use it up
    fusion = denoising.step_weights(windows, config.sampling)[1]

    def second(params, *reused):
        given = params, history, residuals, steps[1].move, fusion, told, shared
        fixed = {"config": config.dit, "branches": steps[1].branches, "group": 1, "stride": windows.stride}
        return given, fixed | {"reuse": Reuse(reused)}

    def flops(*reused):
        given, fixed = second(weights.dit, *reused)
        return cost_of(denoising.step.lower(*given, **fixed).compile().as_text()).flops

    broken = weights.dit | {
        name: jax.tree.map(lambda leaf: np.nan * leaf, weights.dit[name]) for name in ("blocks", "audio")
    }
    with_them, without = (
        denoising.step(*given, **fixed)[0].x for given, fixed in (second(weights.dit, *names), second(broken, *names))
    )
    np.testing.assert_array_equal(without, with_them)
    full, none = flops(), flops(*names)
    assert none < 0.2 * full
    assert flops(names[0]) == pytest.approx((2 * full + none) / 3, rel=0.01)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        pytest.param(["sampling.solver=unipc", "sampling.overlap=3"], marks=pytest.mark.slow),
        pytest.param(["sampling.guided=(0.5, 1.0)"], marks=pytest.mark.slow),
    ],
)
def test_a_wave_reuses_what_lock_step_reuses(config, weights, fields):
    config = cached(set_fields(config, fields), mixed())
    request = make_request(config, 3.0)
    conditions = encode(request, direct(request), weights, config, silent)
    expected = draw_blueprint(conditions, weights, config, silent).latents
    spans = performance.perform(conditions, [conditions.speech], weights, config, group=2, report=silent)
    latents = np.concatenate(list(spans))[: len(expected)]
    np.testing.assert_allclose(latents, expected, atol=2e-5 * np.abs(expected).max())
    full = draw(
        dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, cache=CacheConfig())), weights, 3.0
    )
    assert np.abs(full - expected).max() > 1e-3


@pytest.mark.slow
def test_eight_devices_reuse_what_one_does(config, weights):
    config = cached(config, mixed())
    with jax.set_mesh(make_mesh(1, devices=jax.devices()[:1])):
        one = draw(config, weights)
    mesh = make_mesh(2, 2, 1, 2)
    spread = dataclasses.replace(weights, **{
        name: jax.device_put(getattr(weights, name), jax.NamedSharding(mesh, jax.P()))
        for name in ("dit", "vae", "text", "image", "speech")
    })  # fmt: skip
    with jax.set_mesh(mesh):
        many = draw(config, spread)
    np.testing.assert_allclose(many, one, atol=2e-5 * np.abs(one).max())


def test_calibration_measures_quotients_of_lengths(tmp_path, capsys):
    out = tmp_path / "cache.json"
    soundfile.write(tmp_path / "speech.wav", np.zeros(SAMPLE_RATE // 2), SAMPLE_RATE)
    order = ["--config", "demo:tiny", "--set", "sampling.steps=3", "--speech", str(tmp_path / "speech.wav")]
    assert calibrate_cache.main([*order, "--out", str(out)]) == 0
    cache = read_cache(out)
    assert {each.branch for each in cache.magnitudes} == {
        name_of(branch) for branch in branches_of(demo.tiny().sampling)
    }
    for each in cache.magnitudes:
        assert len(each.sigmas) == 3 and each.sigmas[0] == 1 and each.values[0] == 1
    assert "threshold 0.12: " in capsys.readouterr().out
