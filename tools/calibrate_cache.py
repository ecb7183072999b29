"""Measure when steps may be skipped: python tools/calibrate_cache.py --weights DIR --out FILE.json

Makes one video with every step in full, and follows how large what the transformer's blocks add to its tokens is, from noise
level to noise level, for each branch of guidance: the mean over all tokens of the quotient of their lengths (MagCache, arXiv
2506.09045). `kavatar generate --cache FILE.json` reads what is written. Guidance, shift and size should be those of the
videos to come, the number of steps no smaller; without --portrait and --speech it is a puppet. Prints the quotients, and
which steps would go through the blocks at some thresholds.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from kavatar_jax.cascade import command
from kavatar_jax.cascade.denoise import Shared, Step, Told, plan_steps, take_steps
from kavatar_jax.config import CacheConfig, Config, DiTConfig, Magnitudes, SamplingConfig
from kavatar_jax.console import Display, keep_compiled_programs
from kavatar_jax.diffusion.caching import Reuse, name_of, plan_reuse
from kavatar_jax.diffusion.solver import plan_of
from kavatar_jax.diffusion.windows import Windows
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.types import Params, Report

THRESHOLDS = (0.03, 0.06, 0.12, 0.24, 0.48)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--config", default="")
    parser.add_argument("--mode", choices=("single", "video"), default="single")
    parser.add_argument("--portrait", type=Path)
    parser.add_argument("--last-frame", type=Path)
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--instruction", default="")
    parser.add_argument("--size", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="fields", action="append", default=[], help="replace a field: sampling.shift=5")
    parser.add_argument("--threshold", type=float, default=0.12, help="that the file asks for; --set changes it later")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    arguments = parser.parse_args(words)
    order = command.Order(
        portrait=arguments.portrait, speech=arguments.speech, out=arguments.out, instruction=arguments.instruction,
        config=arguments.config, weights=arguments.weights, mode=arguments.mode, size=arguments.size, seed=arguments.seed,
        last_frame=arguments.last_frame, fields=tuple(arguments.fields),
    )  # fmt: skip
    try:
        if not arguments.out.parent.is_dir() or arguments.out.is_dir():
            raise ValueError(f"--out {arguments.out}: is a folder, or in one that does not exist; name a file")
        keep_compiled_programs()
        config = command.choose_config(order)
        cache = CacheConfig(threshold=arguments.threshold, magnitudes=calibrate(order, config))
    except ValueError as error:
        print(f"calibrate_cache: {error}", file=sys.stderr)
        return 2
    arguments.out.write_text(json.dumps(dataclasses.asdict(cache), indent=1) + "\n")
    show(cache, config.sampling)
    return 0


def calibrate(order: command.Order, config: Config) -> tuple[Magnitudes, ...]:
    """The magnitudes of every branch in the video that the order asks for."""
    console, measured = Console(stderr=True), Measured()
    if order.mode == "video":
        request, plan = command.read_scene(order, config), None
    else:
        request, plan = command.read_performance(order, config, console)
    with jax.set_mesh(make_mesh(**dataclasses.asdict(config.mesh))), Display(console) as display:
        weights = command.open_weights(order, config, console)
        command.draw(order, request, plan, weights, config, display, measured.denoise)
    return measured.magnitudes


class Measured:
    """A way of denoising that follows the residuals. magnitudes: once it was called."""

    def __init__(self):
        self.magnitudes: tuple[Magnitudes, ...] = ()

    def denoise(
        self, params: Params, x: jax.Array, told: Told, shared: Shared, windows: Windows,
        config: DiTConfig, sampling: SamplingConfig, *, stage: str, report: Report,
    ) -> np.ndarray:  # fmt: skip
        """As denoise.denoise, every step in full and every residual kept."""
        steps = [_in_full(step) for step in plan_steps(sampling)]
        curves: dict[str, tuple[list[float], list[float]]] = {}
        last, latents = {}, x
        taken = take_steps(params, x, told, shared, windows, config, sampling, steps)
        for i, (history, residuals) in enumerate(taken):
            latents = history.x
            for name, residual in residuals.items():
                sigmas, values = curves.setdefault(name, ([], []))
                ratio = float(_mean_ratio(residual, last[name], windows.count)) if name in last else 1.0
                sigmas.append(float(steps[i].move.sigma))
                values.append(ratio * (values[-1] if values else 1.0))
            last |= residuals
            report(stage, i + 1, sampling.steps)
        self.magnitudes = tuple(
            Magnitudes(branch=name, sigmas=tuple(sigmas), values=tuple(values))
            for name, (sigmas, values) in curves.items()
        )
        return np.asarray(latents)


def show(cache: CacheConfig, sampling: SamplingConfig) -> None:
    """Quotients by branch and step; and for some thresholds a row of steps for each branch, full ones as #."""
    for each in cache.magnitudes:
        values = np.array(each.values)
        print(f"{each.branch}: " + " ".join(f"{ratio:.3f}" for ratio in values[1:] / values[:-1]))
    branches = [step.branches for step in plan_steps(dataclasses.replace(sampling, cache=CacheConfig()))]
    for threshold in THRESHOLDS:
        reuses = plan_reuse(plan_of(sampling).sigmas, branches, dataclasses.replace(cache, threshold=threshold))
        rows = {
            each.branch: "".join("." if each.branch in reuse.reused else "#" for reuse in reuses)
            for each in cache.magnitudes
        }
        print(f"threshold {threshold}: " + ", ".join(f"{name} {row}" for name, row in rows.items()))


def _in_full(step: Step) -> Step:
    return step._replace(reuse=Reuse(kept=tuple(name_of(branch) for branch in step.branches)))


@jax.jit
def _mean_ratio(new_WSD, old_WSD, count):
    """Of lengths, over the tokens of the first `count` windows."""
    new, old = (jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in (new_WSD, old_WSD))
    real = jnp.arange(new.shape[0])[:, None] < count
    return jnp.mean(new / old, where=jnp.broadcast_to(real, new.shape))


if __name__ == "__main__":
    sys.exit(main())
