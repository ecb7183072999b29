"""Schedules, guidance, solvers and windows in closed form, and the recorded sliding-window sampler."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from configs import demo, stableavatar
from kavatar_jax.diffusion import guidance, solver
from kavatar_jax.diffusion.flow import (
    add_noise,
    predicted_clean,
    sampling_sigmas,
    target_velocity,
    time_shift,
    velocity_towards,
)
from kavatar_jax.diffusion.solver import euler
from kavatar_jax.diffusion.windows import Windows, fuse, fusion_weights, overlap_ramp, slot_bucket
from tools.reference import sampler, solvers, tables
from tools.reference.synthetic_weights import Fixture


@pytest.mark.parametrize("module, name", [(tables, "tables"), (sampler, "sampler"), (solvers, "solvers")])
def test_recorded_outputs(module, name):
    fixture = Fixture(str(GOLDEN / name))
    seen = set()
    for output, value in module.run(fixture):
        fixture.check(output, value)
        seen.add(output)
    assert seen == set(fixture.meta["outputs"])


def test_schedules():
    np.testing.assert_allclose(
        sampling_sigmas(10, 5.0, double_shift=True)[[0, 1, 9, 10]], [1, 0.975743, 0.0244141, 0], atol=1e-6
    )
    once = sampling_sigmas(4, 3.0, double_shift=False)
    np.testing.assert_allclose(once[3], time_shift(0.001, 3.0), atol=1e-7)
    assert (np.diff(once) < 0).all()


def test_levels_of_networks_distilled_to_four_steps():
    """Timesteps 1000, 750, 500 and 250, shifted by 5: those of LightX2V's distilled Wan2.1 and of Wan2.2-Lightning."""
    sampling = replace(stableavatar.config().sampling, steps=4, shift=5.0, double_shift=False, spacing="trailing")
    plan = solver.plan_of(sampling)
    np.testing.assert_allclose(plan.timesteps, [1000, 937.5, 5000 / 6, 625], rtol=1e-6)
    np.testing.assert_allclose(plan.sigmas, [1, 15 / 16, 5 / 6, 5 / 8, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="double_shift=false"):
        replace(sampling, double_shift=True)


def test_euler_is_exact_on_straight_paths():
    x, noise = jnp.array([2.0, -1.0]), jnp.array([0.5, 3.0])
    state = add_noise(x, noise, 0.8)
    np.testing.assert_allclose(euler(state, target_velocity(x, noise), 0.8, 0.0), x, atol=1e-6)
    np.testing.assert_allclose(predicted_clean(state, target_velocity(x, noise), 0.8), x, atol=1e-6)
    np.testing.assert_allclose(velocity_towards(state, x, 0.8), target_velocity(x, noise), atol=1e-5)


def gaussian_velocity(x, sigma, mean=1.5, deviation=0.3):
    """The marginal velocity of a flow to N(mean, deviation^2), under which noise z ends at mean + deviation z."""
    variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
    slope = (sigma - (1 - sigma) * deviation**2) / variance
    return -mean + slope * (x - (1 - sigma) * mean)


def solve(plan, z):
    history = solver.begin(z, plan)
    for move in plan.moves:
        history = solver.advance(history, gaussian_velocity(history.x, move.sigma), move)
    return history.x


def test_solvers_converge_to_the_gaussian_they_flow_to():
    z = jnp.linspace(-2, 2, 9)
    wanted = 1.5 + 0.3 * z

    def euler_error(steps):
        plan = solver.euler_plan(sampling_sigmas(steps, 1.0, double_shift=False))
        return float(jnp.abs(solve(plan, z) - wanted).max())

    def error(make, steps):
        return float(jnp.abs(solve(make(steps, 1.0), z) - wanted).max())

    assert euler_error(200) < 0.02 and euler_error(200) < euler_error(50) / 2.5
    for make in (solver.unipc, solver.dpm_solver):
        assert error(make, 20) < euler_error(50) and error(make, 20) < 0.02


def test_a_plan_of_euler_is_euler():
    x = z = jnp.linspace(-2, 2, 9)
    sigmas = sampling_sigmas(10, 5.0, double_shift=True)
    for sigma, below in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = euler(x, gaussian_velocity(x, sigma), sigma, below)
    np.testing.assert_allclose(solve(solver.euler_plan(sigmas), z), x, atol=1e-6)


def test_plans_keep_only_what_they_look_back_to():
    sampling = demo.tiny().sampling
    kept = {
        name: solver.begin(np.ones(1), solver.plan_of(replace(sampling, solver=name, steps=4)))
        for name in ("euler", "unipc", "dpm++")
    }
    assert {name: [part is not None for part in history] for name, history in kept.items()} == {
        "euler": [True, False, False, False],
        "unipc": [True, True, True, True],
        "dpm++": [True, False, True, False],
    }


def test_three_branches_combine_as_released():
    u, a, p = (np.random.default_rng(i).standard_normal(5).astype(np.float32) for i in range(3))
    branches = guidance.text_and_audio(3.0, 5.0)
    told = {(False, False): u, (False, True): a, (True, True): p}
    stacked = jnp.stack([told[branch.positive, branch.heard] for branch in branches])
    np.testing.assert_allclose(guidance.combine(stacked, branches), u + 5 * (a - u) + 3 * (p - a), rtol=1e-5)


@pytest.mark.parametrize("weights", [(0.5, 0.0), (0.0, 2.0), (1.0, 1.5)])
def test_audio_native_guidance_samples_the_distribution_it_names(weights):
    """p(x) p(speech | x)^w1 p(refined | x)^w2 of normals as wide as one another is a normal, whose mean is known."""
    means = {(True, False): 1.5, (True, True): 0.7, (False, False): 0.2}  # what is heard: speech, no speech, nothing
    branches = guidance.audio_native(*weights)
    assert len(branches) == 1 + sum(weight > 0 for weight in weights) and all(branch.positive for branch in branches)
    x = z = jnp.linspace(-2, 2, 9)
    sigmas = sampling_sigmas(400, 1.0, double_shift=False)
    for sigma, below in zip(sigmas[:-1], sigmas[1:], strict=True):
        told = [gaussian_velocity(x, sigma, means[branch.heard, branch.silent]) for branch in branches]
        x = euler(x, guidance.combine(jnp.stack(told), branches), sigma, below)
    w1, w2 = weights
    np.testing.assert_allclose(x, (1 + w1 + w2) * 1.5 - w1 * 0.7 - w2 * 0.2 + 0.3 * z, atol=0.01)


def test_branches_that_weigh_nothing_are_not_run():
    assert [branch[:2] for branch in guidance.text_and_audio(1.0, 1.0)] == [(True, True)]
    assert len(guidance.text_and_audio(4.0, 4.0)) == 2
    assert len(guidance.negative_frame(guidance.text_and_audio(1.0, 1.0), 1.5)) == 2
    assert len(guidance.negative_frame(guidance.text_and_audio(3.0, 5.0), 1.5)) == 4
    assert len(guidance.negative_frame(guidance.audio_native(1.0, 1.0), 1.5)) == 4
    for rule in (guidance.text_and_audio(3.0, 5.0), guidance.audio_native(0.5, 1.0)):
        assert guidance.negative_frame(rule, 1.0) == rule


RULES = {  # fields of the config, and the weight of each branch: (positive, heard, silent, worn)
    "frame alone": (
        {"text_scale": 1.0, "audio_scale": 1.0, "frame_scale": 1.5},
        {(1, 1, 0, 0): 1.5, (1, 1, 0, 1): -0.5},
    ),
    "frame, text and audio": (
        {"text_scale": 2.0, "audio_scale": 3.0, "frame_scale": 1.25},
        {(0, 0, 0, 0): -2.0, (0, 1, 0, 0): 1.0, (1, 1, 0, 0): 2.25, (1, 1, 0, 1): -0.25},
    ),
    "frame where the prompt weighs nothing": (
        {"text_scale": 0.0, "audio_scale": 2.0, "frame_scale": 2.0},
        {(0, 0, 0, 0): -1.0, (0, 1, 0, 0): 2.0, (1, 1, 0, 0): 1.0, (1, 1, 0, 1): -1.0},
    ),
    "frame and native": (
        {"native": (0.5, 0.25), "frame_scale": 1.5},
        {(1, 1, 0, 0): 2.25, (1, 1, 1, 0): -0.5, (1, 0, 0, 0): -0.25, (1, 1, 0, 1): -0.5},
    ),
}


def told(branch):
    return tuple(map(int, (branch.positive, branch.heard, branch.silent, branch.worn)))


@pytest.mark.parametrize("name", RULES)
def test_rules_add_up(name):
    fields, wanted = RULES[name]
    branches = guidance.branches_of(replace(demo.tiny().sampling, **fields))
    assert {told(branch): branch.weight for branch in branches} == wanted and len(branches) == len(wanted)


def draw_guided(sampling, means, deviations):
    """What noise becomes under a config's guidance, where every branch flows to a normal of its own."""
    x = z = np.linspace(-2, 2, 9)
    sigmas = np.linspace(1, 0, 1501)
    for sigma, below in zip(sigmas[:-1], sigmas[1:], strict=True):
        branches = guidance.branches_of(sampling, (sigma + below) / 2)
        flows = [gaussian_velocity(x, sigma, means[told(b)], deviations[told(b)]) for b in branches]
        x = x + (below - sigma) * np.dot([branch.weight for branch in branches], flows)
    return x, z


SPEAKS, LEVELS = (1, 1, 0, 0), [(0.0, 1.0), (0.0, 0.7), (0.2, 0.8)]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", RULES)
def test_the_mean_that_guidance_leads_to(name, levels):
    """Normals as wide as one another: the weighted mean if there is guidance at every level, else part of the way there.

    With M the weighted mean, m that of the branch without guidance, d the deviation and s(t)^2 = (1 - t)^2 d^2 + t^2,
    x - (1 - t) M grows as s(t) where there is guidance and x - (1 - t) m where there is none.
    """
    fields, weights = RULES[name]
    means = {key: 0.4 + 0.3 * i for i, key in enumerate(weights)}
    x, z = draw_guided(
        replace(demo.tiny().sampling, **fields, guided=levels), means, dict.fromkeys(means, deviation := 0.5)
    )
    way = [(1 - level) / np.hypot((1 - level) * deviation, level) for level in levels]
    share = deviation * (way[0] - way[1])
    assert share == pytest.approx(1) or levels != (0.0, 1.0)
    mean = sum(weight * means[key] for key, weight in weights.items())
    np.testing.assert_allclose(x, means[SPEAKS] + share * (mean - means[SPEAKS]) + deviation * z, atol=0.01)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", RULES)
def test_the_deviation_that_guidance_leads_to(name, levels):
    """Normals about the same mean: scales multiply, s(lo) / s(hi) of each branch to the power of its weight."""
    fields, weights = RULES[name]
    deviations = {key: 0.4 + 0.1 * i for i, key in enumerate(weights)}
    means = dict.fromkeys(deviations, 0.7)
    x, z = draw_guided(replace(demo.tiny().sampling, **fields, guided=levels), means, deviations)

    def spread(key, level):
        return np.hypot((1 - level) * deviations[key], level)

    scale = spread(SPEAKS, levels[1]) * deviations[SPEAKS] / spread(SPEAKS, levels[0])
    for key, weight in weights.items():
        scale *= (spread(key, levels[0]) / spread(key, levels[1])) ** weight
    np.testing.assert_allclose(x, 0.7 + scale * z, atol=0.02)


def test_the_negative_frame_has_levels_of_its_own_within_those_of_guidance():
    """And raised attention none: it is in every branch at every level."""
    sampling = replace(demo.tiny().sampling, frame_scale=1.5, guided=(0.2, 0.8), frame_guided=(0.5, 1.0))
    found = {sigma: guidance.branches_of(sampling, sigma) for sigma in (0.1, 0.4, 0.6, 0.9)}
    assert [sum(branch.worn for branch in branches) for branches in found.values()] == [0, 0, 1, 0]
    assert [len(branches) for branches in found.values()] == [1, 3, 4, 1]
    raised = replace(sampling, audio_attention=1.3)
    for sigma, branches in found.items():
        assert guidance.branches_of(raised, sigma) == tuple(branch._replace(audio_gain=1.3) for branch in branches)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"frame_scale": 0.5}, "sampling.frame_scale is 0.5; it must be at least 1"),
        ({"audio_attention": -1.0}, "sampling.audio_attention is -1.0; it must be at least 0"),
        ({"frame_guided": (0.9, 0.2)}, r"sampling.frame_guided is \(0.9, 0.2\); give two noise levels"),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        replace(demo.tiny().sampling, **fields)


@pytest.mark.parametrize("length, overlap", [(21, 5), (21, 10), (11, 2), (7, 5), (6, 4)])
@pytest.mark.parametrize("total", [3, 21, 22, 40, 63])
@pytest.mark.parametrize("short_end", [False, True])
@pytest.mark.parametrize("scheme", ["log", "uniform", "fixed", "none"])
def test_fusion_equals_laying_windows_down_one_after_another(length, overlap, total, short_end, scheme):
    stride = length - overlap
    windows = Windows(total=total, length=length, stride=stride, slots=9 * 8, short_end=short_end)
    ramp = overlap_ramp(overlap, scheme)
    weights = fusion_weights(windows, ramp)
    stepped = np.random.default_rng(0).standard_normal((windows.slots, length, 2)).astype(np.float32)

    laid = np.zeros((windows.padded_total, 2))
    for k in range(windows.count):
        start, valid = windows.starts[k], windows.valid[k]
        mine = np.ones(valid)
        if k and ramp is not None:
            mine[:overlap] = ramp[:valid]
        laid[start : start + valid] = (
            mine[:, None] * stepped[k, :valid] + (1 - mine[:, None]) * laid[start : start + valid]
        )

    fused = np.asarray(fuse(jnp.asarray(stepped), jnp.asarray(weights), stride))
    np.testing.assert_allclose(windows.join(fused), laid[:total], atol=1e-5)
    for k in range(windows.count):  # neighbours agree where they overlap
        valid = windows.valid[k]
        np.testing.assert_allclose(fused[k, :valid], laid[windows.starts[k] :][:valid], atol=1e-5)


def test_window_lists():
    def spans(total, overlap):
        windows = Windows(total=total, length=21, stride=21 - overlap, slots=30, short_end=True)
        return [(int(s), int(s + v)) for s, v in zip(windows.starts, windows.valid, strict=True)][: windows.count]

    assert spans(32, 5) == [(0, 21), (16, 32)]
    assert spans(40, 10) == [(0, 21), (11, 32), (22, 40)]
    assert spans(63, 5)[-1][1] == 63 and len(spans(63, 5)) == 4
    assert len(spans(375, 5)) == 24


def test_buckets_are_few_and_never_a_third_empty():
    sizes = {slot_bucket(n, multiple=1) for n in range(1, 300)}
    assert len(sizes) < 20
    assert all(n <= slot_bucket(n, multiple=1) <= max(n + 1, 1.5 * n) for n in range(1, 300))
    assert slot_bucket(5, multiple=8) == 8
