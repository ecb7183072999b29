"""What `kavatar compile` does: the programs that `kavatar generate` or `batch` would run are compiled, and kept where those
find them.

The pipeline itself is run, on silence (a plain video: on its own words and pictures) and without weights, its programs
compiled and not called (parallel/programs.py). What a program is compiled for depends on the settings and on how long the
speech is, in steps: windows come in buckets, and from a few windows on single mode has the same programs for any length. In
a cascade the number of sub-clips depends on the pauses as well, which silence does not have; where a storyline gives another
bucket, or more than four different texts, the sampling step is compiled when it is met.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from kavatar_jax.cascade.command import Order, choose_config, draw, find_weights, read_portrait, read_scene
from kavatar_jax.cascade.denoise import Denoise, denoise
from kavatar_jax.cascade.together import Together
from kavatar_jax.cascade.weights import Weights, describe_weights
from kavatar_jax.config import Config
from kavatar_jax.console import keep_compiled_programs
from kavatar_jax.director.rules import direct
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.programs import compiling
from kavatar_jax.types import SAMPLE_RATE, Request, Scene, Speech, Storyline, silent

LONGEST = 3600.0  # seconds of speech: more needs no other programs


def run(order: Order, lengths: str, *, batch: bool = False) -> None:
    """Compile for speech of each of these lengths, seconds with commas between. ValueError for whatever is wrong with it.

    A plain video (mode "video") is as long as its config says, whatever the lengths. batch: what makes many videos together
    """
    seconds = _read_lengths(lengths)
    if batch and order.mode == "video":
        raise ValueError("--batch is for videos in which somebody speaks; --mode video is for kavatar generate")
    config = choose_config(order)
    keep_compiled_programs()
    console, store = Console(highlight=False), _Store(Path(jax.config.jax_compilation_cache_dir))

    def tell(name: str, duration: float) -> None:
        added = store.grown()
        kept = f"{added / 2**20:.2f} MiB" if added else "kept already, or too quickly compiled to be kept"
        console.print(f"{name.strip('_')}: {duration:.1f} s, {kept}")

    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=jax.local_devices() if batch else None)
    with jax.set_mesh(mesh), compiling(tell):
        weights = describe_weights(find_weights(order, config), config)
        with _denoiser(weights, config, mesh, batch=batch) as denoiser:
            for request, plan in _takes(order, config, seconds):
                for _ in draw(order, request, plan, weights, config, silent, denoiser).images:
                    pass
    count, size = store.content()
    console.print(f"{store.folder}: {count} programs, {size / 2**20:.1f} MiB", soft_wrap=True)


@contextlib.contextmanager
def _denoiser(weights: Weights, config: Config, mesh: jax.sharding.Mesh, *, batch: bool) -> Iterator[Denoise]:
    if not batch:
        yield denoise
        return
    with Together(weights.dit, config.dit, config.sampling, mesh) as together:
        yield together.denoise


def _takes(order: Order, config: Config, seconds: list[float]) -> Iterator[tuple[Request | Scene, Storyline | None]]:
    """What the pipeline is run on, and the plan for it where somebody speaks."""
    if order.mode == "video":
        yield read_scene(order, config), None
        return
    portrait = read_portrait(order, config)
    for length in seconds:
        speech = Speech(samples=np.zeros(round(length * SAMPLE_RATE), np.float32))
        request = Request(portrait=portrait, speech=speech, instruction=order.instruction)
        yield request, direct(request)


class _Store:
    """The folder of JAX's persistent compilation cache: a file for each program."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._seen = self._sizes()

    def grown(self) -> int:
        """Bytes of the programs that came in since the last call."""
        before, self._seen = self._seen, self._sizes()
        return sum(size for name, size in self._seen.items() if name not in before)

    def content(self) -> tuple[int, int]:
        """Number of programs, and their bytes."""
        sizes = self._sizes()
        return len(sizes), sum(sizes.values())

    def _sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.folder.glob("*-cache")}


def _read_lengths(text: str) -> list[float]:
    try:
        lengths = [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--lengths {text} is not seconds with commas between, as in 5,30") from None
    for length in lengths:
        if not 0 < length <= LONGEST:
            raise ValueError(f"--lengths {text}: {length:g} is not between 0 and {LONGEST:g} seconds")
    return lengths
