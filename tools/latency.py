"""How late frames come and what they cost: python tools/latency.py [--seconds 12] [--cases 33/8/3 ...] [--weights DIR]

A case is frames of a window / denoising steps / latent frames of overlap. Speech goes through `kavatar stream`'s path as
fast as it can be computed, and a speaker's clock is laid beside it afterwards: work on a window begins when its last sample
has been said and the work before is done. Times are processor seconds of all threads, so that other work on the machine
does not count; where two cores share the work, a video comes sooner. Encoding the file is not in them.

look-ahead: from a frame to the last sample that must be heard before it, at most. delay: from a frame's time to when it is
out, at most, where a second of video costs less than a second. cost: processor seconds a second of video takes, streamed;
single: the same as `generate --mode single` does it; lock-step: with all windows in one batch.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from kavatar_jax.cascade.blueprint import draw_blueprint
from kavatar_jax.cascade.command import DEMO, with_cache
from kavatar_jax.cascade.encode import encode
from kavatar_jax.cascade.performance import draw_performance
from kavatar_jax.cascade.pipeline import generate_live
from kavatar_jax.cascade.stitch import decode
from kavatar_jax.cascade.weights import Weights, load_weights, read_configs
from kavatar_jax.config import Config, load_config, set_fields
from kavatar_jax.console import keep_compiled_programs
from kavatar_jax.director.rules import direct_unheard
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.puppets.identity import sample_identity
from kavatar_jax.puppets.stage import render_portrait
from kavatar_jax.puppets.voice import sample_voice, utter
from kavatar_jax.types import SAMPLE_RATE, Request, Speech, silent

CASES = ("33/8/3", "33/4/3", "33/2/3", "33/1/3", "17/8/2", "17/2/2", "17/1/2")
PUPPET = 7
PIECE = SAMPLE_RATE // 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--weights", type=Path, default=DEMO)
    parser.add_argument("--cache", type=Path, help="as of kavatar generate")
    parser.add_argument("--set", dest="fields", action="append", default=[], help="replace a field")
    arguments = parser.parse_args()
    keep_compiled_programs()
    base = set_fields(with_cache(load_config("demo"), arguments.cache), arguments.fields)
    base = read_configs(arguments.weights, base)
    print(
        "| window, frames | steps | overlap | look-ahead s | delay s | cost | single | lock-step |\n" + "|---" * 8 + "|"
    )
    with jax.set_mesh(make_mesh()):
        weights = load_weights(arguments.weights, base)
        for case in arguments.cases:
            frames, steps, overlap = case.split("/")
            fields = ("window_frames", frames), ("steps", steps), ("overlap", overlap)
            config = set_fields(base, [f"sampling.{name}={value}" for name, value in fields])
            measure(weights, config, arguments.seconds)  # compiles
            ahead, delay, *costs = measure(weights, config, arguments.seconds)
            late = f"{delay:.1f}" if costs[0] < 1 else "falls behind"
            print(
                f"| {frames} | {steps} | {overlap} | {ahead:.1f} | {late} |",
                *(f"{cost:.2f} |" for cost in costs),
                flush=True,
            )


def measure(weights: Weights, config: Config, seconds: float) -> tuple[float, ...]:
    """Look-ahead and delay in seconds; cost streamed, in single mode, and in lock-step."""
    portrait = render_portrait(sample_identity(PUPPET), width=config.width, height=config.height)
    samples = utter(sample_voice(PUPPET), seconds, seed=PUPPET).samples
    nothing = Request(portrait=portrait, speech=Speech(samples=np.zeros(0, np.float32)))
    heard, now, ahead, delay = 0, 0.0, 0.0, 0.0

    def say():
        nonlocal heard
        for start in range(0, len(samples), PIECE):
            heard = min(start + PIECE, len(samples))
            yield samples[start:heard]

    begun = last = time.process_time()

    def work(*_):
        """Work was done on what had been heard by then."""
        nonlocal last, now
        cost, last = time.process_time() - last, time.process_time()
        now = max(now, heard / SAMPLE_RATE) + cost

    for number, _ in enumerate(generate_live(nothing, say(), direct_unheard, weights, config, report=work)):
        work()
        ahead = max(ahead, heard / SAMPLE_RATE - number / config.fps)
        delay = max(delay, now - number / config.fps)
    whole = Request(portrait=portrait, speech=Speech(samples=samples))
    costs = [time.process_time() - begun]
    conditions = encode(whole, direct_unheard(whole), weights, config, silent)
    for draw in (draw_performance, draw_blueprint):
        begun = time.process_time()
        for _ in zip(
            range(conditions.frames),
            decode(draw(conditions, weights, config, silent).latents, weights, config),
            strict=False,
        ):
            pass
        costs.append(time.process_time() - begun)
    return ahead, delay, *(cost / seconds for cost in costs)


if __name__ == "__main__":
    main()
