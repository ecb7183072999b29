"""Wan2.1's solvers around a stand-in network that is a formula."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from kavatar_jax.diffusion import solver
from kavatar_jax.diffusion.flow import TRAIN_STEPS
from tools.reference.synthetic_weights import Fixture

FIXTURES = ("solvers",)
PLANS = {"unipc": solver.unipc, "dpm++": solver.dpm_solver}
STRIDE = 37  # of the recorded trajectory


def run(fixture: Fixture) -> Iterator[tuple[str, Any]]:
    for name, case in fixture.meta["cases"].items():
        plan = PLANS[case["solver"]](case["steps"], case["shift"])
        history, trajectory = solver.begin(jnp.asarray(fixture.inputs(name)["noise"]), plan), []
        for move in plan.moves:
            history = solver.advance(history, _velocity(history.x, move.timestep, case["guidance"]), move)
            trajectory.append(np.asarray(history.x).reshape(-1)[::STRIDE])
        yield f"{name}/timesteps", plan.timesteps
        yield f"{name}/sigmas", plan.sigmas
        yield f"{name}/final", history.x
        yield f"{name}/trajectory", np.stack(trajectory)


def _velocity(x, timestep: int, guidance: float):
    tau = timestep / TRAIN_STEPS

    def branch(c):
        return 0.7 * x + 0.3 * jnp.roll(x, 1, axis=3) - 0.4 * jnp.tanh(2 * x) * tau + c * jnp.cos(x) * (1 - tau)

    return branch(0.1) + guidance * (branch(0.6) - branch(0.1))
