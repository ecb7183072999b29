"""Denoising for many videos at once: windows of whichever videos are ready share a batch, so that no slot idles.

Each video is made by a thread of its own, as if it were alone, but for calling `Together.denoise` where a single video calls
`denoise.denoise`. Its windows wait in one queue with those of all others; one more thread takes them from there in groups of
a fixed size, whichever videos and noise levels they are of, and a video takes its step as soon as its windows are back. One
program serves every group, and no window sees another one of its group: a video comes out bit for bit the same alone and
beside others.
"""

import collections
import contextvars
import functools
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.cascade.denoise import Pictures, Shared, Told, guided_velocity, step_weights
from kavatar_jax.config import DiTConfig, SamplingConfig
from kavatar_jax.diffusion import guidance
from kavatar_jax.diffusion.guidance import Branch
from kavatar_jax.diffusion.solver import History, Move, advance, begin, plan_of
from kavatar_jax.diffusion.windows import Windows, fuse
from kavatar_jax.parallel.programs import program
from kavatar_jax.parallel.sharding import batch_sharding, batch_slots
from kavatar_jax.types import Params, Report


class Stopped(Exception):
    """The work was called off."""


class Window(NamedTuple):
    """One window at one noise level and all that it is told, or a group of G of them with a leading axis.

    x: (T, h, w, C); speech: (L, D); slices: (T, A); frames: (); prompt, negative: (L, D) encoded words;
    condition: (T, h, w, 20); image, director: (L, D); worn: condition and image where the pictures have suffered; each None
    where the transformer is not told of it
    """

    x: Any
    move: Move
    speech: Any
    slices: Any
    frames: Any
    prompt: Any
    negative: Any
    condition: Any
    image: Any
    director: Any
    worn: Pictures | None


class Together:
    """Denoises the windows of several videos together, on all devices of a mesh. A context: leaving it ends its thread.

    mesh: whose devices denoise; used, slots: places in groups that held a window, and places that were computed
    """

    def __init__(self, params: Params, config: DiTConfig, sampling: SamplingConfig, mesh: jax.sharding.Mesh):
        self.size = batch_slots(mesh) * sampling.windows_per_batch
        self.used = self.slots = 0
        self._params, self._config, self.mesh = params, config, mesh
        self._queues: dict[Any, collections.deque] = {}  # windows of one shape and the same branches
        self._moving = 0  # videos between two steps, whose next windows are about to come
        self._open = True
        self._changed = threading.Condition()
        # in the context of its maker, who may only be compiling (parallel/programs.py)
        serve = functools.partial(contextvars.copy_context().run, self._serve)
        self._thread = threading.Thread(target=serve, name="denoising", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Call the work off: whoever waits for windows gets Stopped."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def denoise(
        self, params: Params, x: jax.Array, told: Told, shared: Shared, windows: Windows,
        config: DiTConfig, sampling: SamplingConfig, *, stage: str, report: Report,
    ) -> np.ndarray:  # fmt: skip
        """As `denoise.denoise`, called by the thread of one video; only windows that are not empty are computed."""
        assert params is self._params and config == self._config
        plan = plan_of(sampling)
        first, later = step_weights(windows, sampling)
        history = begin(np.asarray(x), plan)
        self._add_moving(1)
        try:
            for i, move in enumerate(plan.moves):
                branches, level = guidance.branches_of(sampling, float(move.sigma)), _single(move)
                now = np.asarray(history.x)
                windowed = [_window(now, level, told, shared, k) for k in range(windows.count)]
                velocity = self._ask(windowed, branches).wait(now)
                history = _settle(history, velocity, first if i == 0 else later, level, stride=windows.stride)
                report(stage, i + 1, sampling.steps)
        finally:
            self._add_moving(-1)
        return np.asarray(history.x)

    def _ask(self, windows: list[Window], branches: tuple[Branch, ...]) -> "_Turn":
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(windows[0])]
        kind, turn = (branches, jax.tree.structure(windows[0]), tuple(shapes)), _Turn(len(windows))
        with self._changed:
            if not self._open:
                raise Stopped()
            queue = self._queues.setdefault(kind, collections.deque())
            queue.extend((turn, k, window) for k, window in enumerate(windows))
            self._moving -= 1
            self._changed.notify_all()
        return turn

    def _add_moving(self, count: int) -> None:
        with self._changed:
            self._moving += count
            self._changed.notify_all()

    def _serve(self) -> None:
        running = None
        with jax.set_mesh(self.mesh):
            while (taken := self._take(wait=running is None)) is not None or running is not None:
                # the next group is on its way before this one is fetched
                started = taken and (taken[1], self._start(*taken))
                if running is not None:
                    self._deliver(*running)
                running = started
        for queue in self._queues.values():
            self._deliver(list(queue), Stopped())

    def _take(self, *, wait: bool):
        """(branches, windows) of the next group, or None once stopped.

        wait: for windows to come; else None unless there is a full group. One that is not full is taken only if no video is
        about to add to it.
        """
        with self._changed:
            while self._open:
                full = [kind for kind, queue in self._queues.items() if len(queue) >= self.size]
                some = [kind for kind, queue in self._queues.items() if queue and not self._moving]
                if full or (some and wait):
                    kind = (full or some)[0]
                    queue = self._queues.pop(kind)  # behind the others, so that every kind has its turn
                    taken = [queue.popleft() for _ in range(min(self.size, len(queue)))]
                    self._queues[kind] = queue
                    return kind[0], taken
                if not wait:
                    return None
                self._changed.wait()
        return None

    def _start(self, branches: tuple[Branch, ...], taken: list):
        """The velocities of a group, not waited for; an exception in their place."""
        self.used, self.slots = self.used + len(taken), self.slots + self.size
        windows = [window for _, _, window in taken]
        windows += windows[-1:] * (self.size - len(taken))
        try:
            group = jax.tree.map(lambda *leaves: np.stack(leaves), *windows)
            group = jax.device_put(group, batch_sharding(self.mesh))
            return _velocities(self._params, group, config=self._config, branches=branches)
        except Exception as error:  # whatever it is, it is the videos' to report
            return error

    def _deliver(self, taken: list, velocities) -> None:
        try:
            answers = [velocities] * len(taken) if isinstance(velocities, Exception) else np.asarray(velocities)
        except Exception as error:  # of a computation that was under way
            answers = [error] * len(taken)
        with self._changed:
            # there may be more answers than windows: a group that was filled up
            for (turn, k, _), answer in zip(taken, answers, strict=False):
                self._moving += turn.add(k, answer)


class _Turn:
    """One step of one video: the velocities of its windows as they come in, or what went wrong with them."""

    def __init__(self, count: int):
        self._answers: list = [None] * count
        self._missing, self._complete = count, threading.Event()

    def add(self, k: int, answer: np.ndarray | Exception) -> bool:
        """Whether this was the last."""
        self._answers[k] = answer
        self._missing -= 1
        if not self._missing:
            self._complete.set()
        return not self._missing

    def wait(self, x: np.ndarray) -> np.ndarray:
        """The velocity of x, (slots, T, h, w, C): zero in empty slots."""
        self._complete.wait()
        velocity = np.zeros_like(x)
        for k, answer in enumerate(self._answers):
            if isinstance(answer, Exception):
                raise answer
            velocity[k] = answer
        return velocity


@program(static_argnames=("config", "branches"))
def _velocities(params, group: Window, *, config: DiTConfig, branches: tuple[Branch, ...]):
    """(G, T, h, w, C): of windows of any videos, each at its own noise level."""
    each = jnp.arange(len(group.x))
    told = Told(group.speech, group.slices, prompt=each, negative=each + len(group.x), view=each, frames=group.frames)
    text = jnp.concatenate([group.prompt, group.negative])
    shared = Shared(text, group.image, group.condition, group.director, group.worn)
    velocity, _ = guided_velocity(params, group.move, shared, config, branches, group.x, told, reused={})
    return velocity


@program(static_argnames="stride")
def _settle(history: History, velocity, weights, move: Move, *, stride: int) -> History:
    return advance(history, fuse(velocity, weights, stride), move)


def _single(move: Move) -> Move:
    return Move(*(np.asarray(part, np.float32) for part in move))


def _window(x: np.ndarray, move: Move, told: Told, shared: Shared, k: int) -> Window:
    worn = shared.worn

    def of(rows, row=k):
        return None if rows is None else np.asarray(rows[row])

    return Window(
        x=x[k], move=move, speech=of(told.speech), slices=of(told.slices), frames=of(told.frames),
        prompt=of(shared.text, told.prompt[k]), negative=of(shared.text, told.negative[k]),
        condition=of(shared.condition, told.view[k]), image=of(shared.image, 0), director=of(shared.director, 0),
        worn=worn and Pictures(of(worn.image, 0), of(worn.condition, told.view[k])),
    )  # fmt: skip
