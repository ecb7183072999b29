"""What `kavatar batch` does: make every video of a manifest, many at a time, and keep a ledger of them.

Every process of a run that has several takes its share of the manifest and makes it on its own devices. A job goes through
three hands: its inputs are loaded while the device works on those before it, its windows are denoised together with those of
its neighbours, and its frames are written while the device works on those after it.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from rich.console import Console

from kavatar_jax.cascade.blueprint import plan_windows
from kavatar_jax.cascade.command import Order, draw, open_weights, read_order, read_performance
from kavatar_jax.cascade.hear import plan_latents
from kavatar_jax.cascade.manifest import Job, Ledger, fingerprint, read_manifest
from kavatar_jax.cascade.together import Stopped, Together
from kavatar_jax.cascade.weights import Weights
from kavatar_jax.config import Config
from kavatar_jax.console import Display, keep_compiled_programs
from kavatar_jax.media.audio import load_speech
from kavatar_jax.media.video import remove_leftovers, write_video
from kavatar_jax.parallel.mesh import make_mesh, wait_for_processes
from kavatar_jax.types import Request, Storyline, Video

GROUPS_IN_FLIGHT = 4  # so many groups' worth of windows are at work together: two would do but for videos between steps
WRITERS = 2  # videos that are decoded and written at a time
STAGES = {  # of a video, in the order they happen
    "single": ("performing", "decoding frames"),
    "cascade": ("performing", "choosing keyframes", "rendering sub-clips", "decoding frames"),
}


def run(manifest: Path, order: Order) -> bool:
    """Make the videos of a manifest that are not done yet; whether all of them are now.

    order: what they have in common; `out` is the folder they go to
    ValueError, before any work, for whatever is wrong with the call.
    """
    if order.mode == "video":
        raise ValueError("--mode video is for kavatar generate; somebody speaks in every video of a batch")
    console, ledger = Console(stderr=True, markup=False, highlight=False), Ledger(order.out)
    keep_compiled_programs()
    jobs, faults = read_manifest(manifest, order)
    if order.out.exists() and not order.out.is_dir():
        raise ValueError(f"--out {order.out} is a file; give a folder for the videos")
    order.out.mkdir(parents=True, exist_ok=True)
    config = read_order(dataclasses.replace(order, out=order.out / "video.mp4"))
    if config.sampling.cache.threshold:
        raise ValueError(
            f"sampling.cache.threshold is {config.sampling.cache.threshold}; a batch keeps nothing from step to step: "
            "its windows may be in other company in each; set it to 0"
        )
    if jax.process_index() == 0:
        for fault in faults:
            console.print(fault.error, soft_wrap=True)
            ledger.add(status="failed", **dataclasses.asdict(fault))
    mine = jobs[jax.process_index() :: jax.process_count()]
    names = {job.name for job in mine}
    remove_leftovers(order.out, names)
    done = ledger.done()
    left = [job for job in mine if done.get(job.name) != fingerprint(job, config) or not job.order.out.is_file()]
    if len(left) < len(mine):
        console.print(f"{len(mine) - len(left)} of {len(mine)} videos are done already")
    failed = _make_all(left, config, ledger, console) if left else 0
    remove_leftovers(order.out, names)
    wait_for_processes("kavatar batch")
    console.print(
        f"{order.out}: {len(mine) - failed} of {len(mine)} videos are there, {len(faults)} bad lines", soft_wrap=True
    )
    return not failed and not faults


def _make_all(jobs: list[Job], config: Config, ledger: Ledger, console: Console) -> int:
    """How many could not be made."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=jax.local_devices())
    with jax.set_mesh(mesh), Display(console) as display:
        weights = open_weights(jobs[0].order, config, console)
        display("loading weights", 1, 1)
        with Together(weights.dit, config.dit, config.sampling, mesh) as together:
            studio = _Studio(weights, config, together, ledger, display, console)
            studio.make(jobs)
    if together.slots:
        console.print(f"batches of {together.size} windows, {together.used / together.slots:.0%} full")
    return studio.failed


class _Studio:
    """Makes jobs: their inputs are loaded by one thread, each video has one of its own, all are denoised together."""

    def __init__(
        self, weights: Weights, config: Config, together: Together, ledger: Ledger, display: Display, console: Console
    ):
        self._weights, self._config, self._together = weights, config, together
        self._ledger, self._console = ledger, console
        self._progress, self._stopped, self.failed = _Progress(display), False, 0
        self._room, self._busy = threading.Condition(), {}  # windows of each video that is being denoised
        self._writers = threading.Semaphore(WRITERS)

    def make(self, jobs: list[Job]) -> None:
        most = GROUPS_IN_FLIGHT * self._together.size
        with ThreadPoolExecutor(most) as pool:
            try:
                for job, windows in self._in_order(jobs):
                    with self._answering_for(job):
                        request, plan = read_performance(job.order, self._config, self._console)
                        self._wait_for_room(job, windows, most)
                        pool.submit(self._make, job, request, plan)
            except BaseException:
                self._stopped = True
                self._together.stop()
                raise

    def _in_order(self, jobs: list[Job]) -> list[tuple[Job, int]]:
        """Jobs and how many windows they have: one shape after the other, the longest first so that none is last alone."""
        sized = []
        for job in jobs:
            with self._answering_for(job):
                samples = len(load_speech(job.order.speech).samples)
                sized.append((job, plan_windows(samples, self._config)))
                self._progress.expect(job, plan_latents(samples, self._config.fps, self._config.sampling)[0])
        sized.sort(key=lambda pair: (pair[0].order.mode, -pair[1].slots))
        return [(job, windows.count) for job, windows in sized]

    def _wait_for_room(self, job: Job, windows: int, most: int) -> None:
        """Until there are few enough windows at work; two videos may be however long they are."""
        with self._room:
            self._room.wait_for(lambda: len(self._busy) < 2 or sum(self._busy.values()) + windows <= most)
            self._busy[job.name] = windows

    def _make(self, job: Job, request: Request, plan: Storyline) -> None:
        started = time.perf_counter()
        with self._answering_for(job), jax.set_mesh(self._together.mesh):
            video = self._draw(job, request, plan)
            with self._writers:
                seconds = video.frames / video.fps
                write_video(job.order.out, video.images, fps=video.fps, speech=video.speech, seconds=seconds)
            self._ledger.add(
                status="done", line=job.line, name=job.name, fingerprint=fingerprint(job, self._config),
                frames=video.frames, seconds=seconds, took=round(time.perf_counter() - started, 2),
            )  # fmt: skip
            self._progress.finish(job)

    def _draw(self, job: Job, request: Request, plan: Storyline) -> Video:
        def report(stage: str, done: int, total: int) -> None:
            if self._stopped:
                raise Stopped()
            self._progress(job, stage, done / total)

        try:
            return draw(job.order, request, plan, self._weights, self._config, report, self._together.denoise)
        finally:
            with self._room:
                del self._busy[job.name]
                self._room.notify_all()

    @contextlib.contextmanager
    def _answering_for(self, job: Job) -> Iterator[None]:
        """Whatever goes wrong with one video is told, and the others go on."""
        try:
            yield
        except Stopped:
            pass
        except Exception as error:
            with self._room:
                self.failed += 1
            self._console.print(f"line {job.line}, {job.name}: {error}", soft_wrap=True)
            self._ledger.add(status="failed", line=job.line, name=job.name, error=f"{type(error).__name__}: {error}")
            self._progress.finish(job)


class _Progress:
    """How far the videos are, in frames that are made bit by bit; from any thread."""

    def __init__(self, display: Display):
        self._display, self._lock = display, threading.Lock()
        self._frames, self._parts = {}, {}
        self._made, self._expected, self._finished = 0.0, 0, 0

    def expect(self, job: Job, frames: int) -> None:
        self._frames[job.name], self._parts[job.name] = frames, 0.0
        self._expected += frames

    def __call__(self, job: Job, stage: str, part: float) -> None:
        stages = STAGES[job.order.mode]
        if stage in stages:
            self._show(job, (stages.index(stage) + part) / len(stages))

    def finish(self, job: Job) -> None:
        self._show(job, 1.0, finished=1)

    def _show(self, job: Job, part: float, finished: int = 0) -> None:
        with self._lock:
            if job.name in self._frames:  # else its speech could not even be read
                self._made += self._frames[job.name] * (part - self._parts[job.name])
                self._parts[job.name] = part
                self._finished += finished
                self._display("frames", round(self._made), self._expected)
                self._display("videos", self._finished, len(self._frames))
