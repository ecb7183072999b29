"""Flow matching: noise schedules, interpolation and its velocity.

x_sigma = (1 - sigma) x_0 + sigma noise; the model predicts v = noise - x_0; timestep = 1000 sigma.
"""

import numpy as np

TRAIN_STEPS = 1000


def time_shift(sigma, shift: float):
    """Move noise levels towards 1: shift * sigma / (1 + (shift - 1) * sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampling_sigmas(steps: int, shift: float, *, double_shift: bool, spacing: str = "linspace") -> np.ndarray:
    """Noise levels of a sampler from 1 down to 0: (steps + 1,) float32.

    spacing: of the levels before the shift, as diffusers calls it. "linspace" from 1 to the smallest level of training,
    whose last step hardly moves; "trailing" in equal steps to 0, where networks distilled to few steps were trained.
    double_shift is what diffusers 0.30's FlowMatchEulerDiscreteScheduler does for StableAvatar: the smallest level is
    already shifted when the grid is laid, and the whole grid is shifted again.
    """
    if spacing == "trailing":
        return time_shift(np.linspace(1, 0, steps + 1), shift).astype(np.float32)
    last = 1 / TRAIN_STEPS
    grid = np.linspace(1, time_shift(last, shift) if double_shift else last, steps)
    return np.append(time_shift(grid, shift), 0).astype(np.float32)


def training_sigmas(shift: float) -> np.ndarray:
    """The noise levels that training draws from, from 1 down to the smallest: (1000,) float32."""
    return time_shift(np.arange(TRAIN_STEPS, 0, -1) / TRAIN_STEPS, shift).astype(np.float32)


def add_noise(x, noise, sigma):
    """x at noise level sigma, which broadcasts against x."""
    return (1 - sigma) * x + sigma * noise


def target_velocity(x, noise):
    return noise - x


def predicted_clean(x_sigma, velocity, sigma):
    """The clean sample that a velocity points to."""
    return x_sigma - sigma * velocity


def velocity_towards(x_sigma, clean, sigma):
    """The velocity that points to a clean sample, the inverse of `predicted_clean`; sigma is above 0."""
    return (x_sigma - clean) / sigma
