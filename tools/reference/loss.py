"""StableAvatar's training objective: noising, mask resizing, the weighted loss and its gradient."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.diffusion.flow import add_noise, target_velocity
from kavatar_jax.training.config import ObjectiveConfig
from kavatar_jax.training.objective import loss_weight, resize_masks, velocity_loss
from tools.reference.synthetic_weights import Fixture

FIXTURES = ("loss",)
RELEASED = ObjectiveConfig(masks="released", motion="channels", motion_weight=0.25)


def run(fixture: Fixture) -> Iterator[tuple[str, np.ndarray]]:
    for name, case in fixture.meta["cases"].items():
        arrays = {key: np.moveaxis(value, 1, -1) for key, value in fixture.inputs(name).items()}
        x0, noise, predicted = arrays["x0"], arrays["noise"], arrays["pred"]
        sigma = jnp.asarray(case["sigma"], jnp.float32)[:, None, None, None, None]
        yield f"{name}/x_t", _channels_first(add_noise(x0, noise, sigma))
        size = (case["latent_frames"], case["h"], case["w"])
        face, lip = (resize_masks(arrays[key][..., 0], size, RELEASED.masks) for key in ("face", "lip"))
        yield f"{name}/face_mask", np.asarray(face)[:, None]
        yield f"{name}/lip_mask", np.asarray(lip)[:, None]
        rows, target = [], target_velocity(x0, noise)
        for gamma in case["gammas"]:
            weight = loss_weight(jnp.full(len(x0), gamma), face, lip, RELEASED)
            rows.append((gamma, *(float(_loss(predicted, target, weight, share)) for share in (0.0, 1.0, 0.25))))
            gradient = jax.grad(_loss)(predicted, target, weight, RELEASED.motion_weight)
            yield f"{name}/grad_gamma_{gamma}", 1000 * _channels_first(gradient)
        yield f"{name}/loss_table", np.array(rows)


def _loss(predicted, target, weight, motion_share: float):
    config = ObjectiveConfig(motion=RELEASED.motion, motion_weight=motion_share)
    return velocity_loss(predicted, target, weight, config).mean()


def _channels_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)
