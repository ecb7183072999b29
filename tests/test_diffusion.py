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
