"""Solvers of dx/dsigma = v(x, sigma), as steps that know nothing of models or windows.

Every multistep solver of the family is linear in the sample and in the last clean predictions, so a solver is a table of
coefficients, made once on the host in float64, and one step that applies a row of it.
"""

from typing import NamedTuple

import numpy as np

from kavatar_jax.config import SamplingConfig
from kavatar_jax.diffusion.flow import TRAIN_STEPS, predicted_clean, sampling_sigmas, time_shift


class Move(NamedTuple):
    """One step of a Plan, a row of each of its tables."""

    sigma: np.ndarray
    timestep: np.ndarray
    correct: np.ndarray
    predict: np.ndarray


class Plan(NamedTuple):
    """A schedule and a solver for it. sigmas: (n + 1,) with the final 0; timesteps: (n,) what the model is told.

    correct: (n, 4) weights of the sample before, the newest prediction and the two before it; a row of zeros corrects
    nothing. predict: (n, 3) weights of the sample, the newest prediction and the last.
    """

    sigmas: np.ndarray
    timesteps: np.ndarray
    correct: np.ndarray
    predict: np.ndarray

    @property
    def moves(self) -> list[Move]:
        return [Move(*row) for row in zip(self.sigmas[:-1], *self[1:], strict=True)]


class History(NamedTuple):
    """x: the sample; before: the sample that the last step started from; last, older: earlier clean predictions.

    What a Plan never looks back to is None.
    """

    x: np.ndarray
    before: np.ndarray | None
    last: np.ndarray | None
    older: np.ndarray | None


def plan_of(sampling: SamplingConfig) -> Plan:
    """The schedule and the solver that a run's config asks for."""
    if sampling.solver == "euler":
        levels = {"double_shift": sampling.double_shift, "spacing": sampling.spacing}
        return euler_plan(sampling_sigmas(sampling.steps, sampling.shift, **levels))
    return {"unipc": unipc, "dpm++": dpm_solver}[sampling.solver](sampling.steps, sampling.shift)


def euler(x, velocity, sigma, sigma_next):
    """One Euler step from sigma to sigma_next; exact when v does not depend on x or sigma."""
    return x + (sigma_next - sigma) * velocity


def begin(x, plan: Plan) -> History:
    """The state before the first step of a Plan."""
    corrects, predicts = (np.any(table, axis=0) for table in (plan.correct, plan.predict))
    kept = corrects[0], corrects[2] or predicts[2], corrects[3]
    return History(x, *(0 * x if keep else None for keep in kept))


def advance(history: History, velocity, move: Move) -> History:
    """One step of a Plan: `velocity` is the model's at history.x."""
    clean = predicted_clean(history.x, velocity, move.sigma)
    # a row of zeros leaves the predicted sample as it is: the first step, and solvers that do not correct
    keep = 1.0 * (abs(move.correct).sum() == 0)
    x = keep * history.x + _weighted(move.correct, history.before, clean, history.last, history.older)
    new = History(_weighted(move.predict, x, clean, history.last), x, clean, history.last)
    return History(*(None if old is None else part for old, part in zip(history, new, strict=True)))


def euler_plan(sigmas: np.ndarray) -> Plan:
    """Euler over any noise levels (n + 1,): on the line from the sample to the newest prediction."""
    ratio = sigmas[1:].astype(np.float64) / sigmas[:-1]
    predict = np.stack([ratio, 1 - ratio, 0 * ratio], axis=1)
    return Plan(sigmas, sigmas[:-1] * TRAIN_STEPS, np.zeros((len(ratio), 4)), predict)


def unipc(steps: int, shift: float) -> Plan:
    """UniPC of order 2 with the bh2 variant (arXiv 2302.04867), as Wan2.1 samples with it."""
    sigmas = _shifted(np.linspace(float(np.float32(1 - 1 / TRAIN_STEPS)), 0, steps + 1)[:-1], shift)
    alpha, lam = 1 - sigmas, _log_snr(sigmas)
    correct, predict = np.zeros((steps, 4)), np.zeros((steps, 3))
    for i in range(steps):
        if i:
            h = lam[i] - lam[i - 1]
            phi = np.expm1(-h)
            base = np.array([sigmas[i] / sigmas[i - 1], 0, -alpha[i] * phi, 0])
            if _order(i - 1, steps) == 1:
                difference = 0.5 * np.array([0, 1, -1, 0])
            else:
                r = (lam[i - 2] - lam[i - 1]) / h
                k1 = phi / -h - 1
                k2 = k1 / -h - 0.5
                b1, b2 = k1 / phi, 2 * k2 / phi
                rho1 = (b1 - b2) / (1 - r)
                difference = rho1 / r * np.array([0, 0, -1, 1]) + (b1 - rho1) * np.array([0, 1, -1, 0])
            correct[i] = base - alpha[i] * phi * difference
        predict[i] = _predictor(i, sigmas, alpha, lam, _order(i, steps))
    return Plan(sigmas.astype(np.float32), _whole_timesteps(sigmas), correct, predict)


def dpm_solver(steps: int, shift: float) -> Plan:
    """DPM-Solver++ 2M, midpoint form (arXiv 2211.01095), as Wan2.1 samples with it; first and last step of order 1."""
    sigmas = _shifted(np.linspace(1, 0, steps + 1)[:-1], shift)
    alpha, lam = 1 - sigmas, _log_snr(sigmas)
    orders = [1 if i in (0, steps - 1) else 2 for i in range(steps)]
    predict = np.array([_predictor(i, sigmas, alpha, lam, order) for i, order in enumerate(orders)])
    return Plan(sigmas.astype(np.float32), _whole_timesteps(sigmas), np.zeros((steps, 4)), predict)


def _weighted(weights, *parts):
    return sum(weight * part for weight, part in zip(weights, parts, strict=True) if part is not None)


def _predictor(i: int, sigmas, alpha, lam, order: int) -> np.ndarray:
    """x+ = (s'/s) x - a' (e^-h - 1) (m + (m - m_last) / 2r), the second difference at order 2 only."""
    h = lam[i + 1] - lam[i]
    phi = np.expm1(-h)
    row = np.array([sigmas[i + 1] / sigmas[i], -alpha[i + 1] * phi, 0])
    if order == 2 and np.isfinite(lam[i - 1]):  # from pure noise, where lambda is infinite, the difference vanishes
        slope = -alpha[i + 1] * phi * 0.5 * h / (lam[i] - lam[i - 1])
        row += np.array([0, slope, -slope])
    return row


def _order(i: int, steps: int) -> int:
    return min(2, steps - i, i + 1)


def _shifted(grid: np.ndarray, shift: float) -> np.ndarray:
    return np.append(time_shift(grid, shift), 0.0)


def _log_snr(sigmas: np.ndarray) -> np.ndarray:
    """ln(1 - sigma) - ln(sigma): minus infinity at pure noise, infinity at none."""
    with np.errstate(divide="ignore"):
        return np.log1p(-sigmas) - np.log(sigmas)


def _whole_timesteps(sigmas: np.ndarray) -> np.ndarray:
    """Cut off, not rounded, in float64 as the reference does: 249 where the level is a hair below 0.25."""
    return np.floor(sigmas[:-1] * TRAIN_STEPS).astype(np.int64)
