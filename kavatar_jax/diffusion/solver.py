"""Solvers of dx/dsigma = v(x, sigma), as steps that know nothing of models or windows."""


def euler(x, velocity, sigma, sigma_next):
    """One Euler step from sigma to sigma_next; exact when v does not depend on x or sigma."""
    return x + (sigma_next - sigma) * velocity
