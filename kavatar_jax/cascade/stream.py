"""What `kavatar stream` does: speech is read as it comes, and the video that it gives can be watched meanwhile.

A frame is shown when the speech of its window and of `steps` more windows has been heard (diffusion/wavefront.py): that is
what the same numbers as for the whole speech cost, and shorter windows or fewer steps cost less. What happens is one shot
for the whole instruction, since the director's cuts at pauses need speech that is yet to come (`direct_unheard`).
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from kavatar_jax.cascade.command import Order, choose_config, open_weights, read_portrait
from kavatar_jax.cascade.hear import plan_latents
from kavatar_jax.cascade.pipeline import generate_live
from kavatar_jax.config import Config
from kavatar_jax.console import Display, keep_compiled_programs
from kavatar_jax.director.rules import direct_unheard
from kavatar_jax.media.live import Moment, Tape, read_live, write_live
from kavatar_jax.media.video import check_writable
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.types import SAMPLE_RATE, Report, Request, Speech

STANDARD = Path("-")  # input or output


def run(order: Order, *, rate: int, follow: float | None) -> None:
    """Make the video. ValueError, before any work, for whatever is wrong with the order."""
    console = Console(stderr=True)
    keep_compiled_programs()
    config = choose_config(order)
    if config.sampling.indexing != "exact":
        raise ValueError(
            f"sampling.indexing is {config.sampling.indexing!r}, where the last window depends on the end of the speech; "
            "a stream needs 'exact'"
        )
    out = None if order.out == STANDARD else check_writable(order.out)
    if out is not None and out.suffix.lower() != ".mp4":
        raise ValueError(f"--out {out}: what plays while it grows is an .mp4; or give - for raw frames")
    source = None if order.speech == STANDARD else order.speech
    if source is None and follow is not None:
        raise ValueError(f"--follow {follow:g} is for a file that grows: --speech FILE")
    tape = Tape(read_live(source, rate=rate, follow=follow))
    nothing = Speech(samples=np.zeros(0, np.float32))
    request = Request(
        portrait=read_portrait(order, config), speech=nothing, instruction=order.instruction, seed=order.seed
    )
    with jax.set_mesh(make_mesh(**dataclasses.asdict(config.mesh))), Display(console) as display:
        weights = open_weights(order, config, console)
        # compiles everything, so that no speech has to wait for that
        for _ in generate_live(request, [np.zeros(1, np.float32)], direct_unheard, weights, config, report=display):
            pass
        frames = generate_live(request, tape, direct_unheard, weights, config)
        count = write_live(out, shown(frames, tape, config, display), fps=config.fps)
    console.print(f"{order.out}: {count} frames, {count / config.fps:.1f} s of video")


def shown(frames: Iterable[np.ndarray], tape: Tape, config: Config, report: Report) -> Iterator[Moment]:
    """Each frame with its sound, up to the last one that was spoken."""
    for number, frame in enumerate(frames, 1):
        heard, _ = plan_latents(tape.samples, config.fps, config.sampling)
        if tape.over and number > heard:
            return
        report("frames, of those heard", number, heard)
        yield frame, tape.take(round(number * SAMPLE_RATE / config.fps))
