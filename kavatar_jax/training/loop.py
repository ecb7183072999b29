"""The trainer, on a page: a config goes in; checkpoints, a log, samples and weights come out."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import chex
import jax
import numpy as np

from kavatar_jax.checkpoint.bridge import flatten
from kavatar_jax.checkpoint.store import Store
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import described
from kavatar_jax.training.config import TrainConfig
from kavatar_jax.training.data import Loaded, Loader
from kavatar_jax.training.export import export
from kavatar_jax.training.log import Log
from kavatar_jax.training.sampling import open_samples
from kavatar_jax.training.state import TrainState, adopt, begin, drawn_anew, join
from kavatar_jax.training.step import Metrics, cast_votes, draw_clip_level, make_step
from kavatar_jax.training.tasks import Task, Work, open_task
from kavatar_jax.types import Params


class Diverged(ValueError):
    """The loss or its gradient was not finite."""


def train(config: TrainConfig, out: Path, *, resume: bool) -> int:
    """Train until config.steps, or until SIGTERM; the number of steps done.

    Under `out`: checkpoints/, log.jsonl, events/, samples/ and, when all steps are done, weights/ of the networks that
    learnt or began from chance. `resume` goes on from the newest checkpoint, if there is one, on whatever mesh.
    ValueError for what the config asks for and cannot be; Diverged, with the step and its clips, when numbers blow up:
    the last good state is saved before.
    """
    config = adopt(config)
    chex.clear_trace_counter()  # counts programs by their source, and so over all runs of a process
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    with jax.set_mesh(mesh), Store(out / "checkpoints", keep=config.checkpoint.keep) as store:
        task = open_task(config, mesh)
        state, frozen, shardings = begin(config, task.components, mesh)
        state, position = _restore(store, state, shardings, resume)
        fixed = task.prepare(frozen)
        step = make_step(task.losses, task.draw, config, shardings, mesh)
        batches = Loader(config.data, task.row, config.model, mesh, position=position)
        samples = open_samples(config, task, fixed, mesh, out)

        with Log(config.log, out, config.steps) as log, _sigterm() as asked:
            watch = Watch(log, store, task, _learning_share(state.trained, frozen))
            for done in range(int(state.step) + 1, config.steps + 1):
                loaded = next(batches)
                batch = task.encode(fixed, loaded.clips)
                state, metrics = step(state, fixed, batch, cast_votes(asked(), mesh), draw_clip_level(config, done))
                watch.hear(done, loaded, metrics, state)
                finishing = watch.stop or done == config.steps
                if finishing or done % config.checkpoint.every == 0:
                    watch.catch_up(state)
                    store.save(done, state, {"position": batches.position})
                if samples is not None and (done % samples.every == 0 or done == config.steps):
                    log.picture(done, samples(done, join(best(state), frozen)))
                if watch.stop:
                    log.word(f"asked to stop: step {done} is saved, go on with --resume")
                    return done
        whole = join(best(state), frozen)
        names = task.learning | (drawn_anew(config) & set(task.components))
        export(task.settle(whole, batches), names, whole, out / "weights", start=config.weights)
    return config.steps


def best(state: TrainState) -> Params:
    """The averaged weights, where there are any."""
    return state.trained if state.ema is None else state.ema


class Watch:
    """Reads each step's metrics while the device works on the next one; `stop` once any process was asked to.

    Diverged as soon as a step is heard of whose numbers are not finite.
    """

    def __init__(self, log: Log, store: Store, task: Task, share: float):
        self.stop = False
        self._log, self._store, self._task, self._share = log, store, task, share
        self._pending: tuple[int, Loaded, Metrics] | None = None

    def hear(self, done: int, loaded: Loaded, metrics: Metrics, state: TrainState) -> None:
        before, self._pending = self._pending, (done, loaded, metrics)
        self._read(before, state)

    def catch_up(self, state: TrainState) -> None:
        before, self._pending = self._pending, None
        self._read(before, state)

    def _read(self, pending, state: TrainState) -> None:
        if pending is None:
            return
        done, loaded, metrics = pending
        metrics = jax.device_get(metrics)
        if not metrics.healthy:
            self._give_up(done, loaded, state)
        self.stop = self.stop or bool(metrics.stop)
        one, clips = self._task.work(loaded.bucket, self._share), loaded.bucket.batch
        self._log.take(done, metrics, Work(one.tokens * clips, one.flops * clips))

    def _give_up(self, done: int, loaded: Loaded, state: TrainState) -> None:
        good = int(state.step)
        healthy = jax.device_put(np.ones((), bool), state.healthy.sharding)
        self._store.save(good, state._replace(healthy=healthy), {"position": loaded.number})
        self._store.wait()
        raise Diverged(
            f"step {done}: the loss or its gradient is not finite. Batch {loaded.number}: {', '.join(loaded.names)}. "
            f"The state after step {good} is saved; go on from it with --resume and, say, a lower learning rate"
        )


def _restore(store: Store, state: TrainState, shardings: TrainState, resume: bool) -> tuple[TrainState, int]:
    """The state, and the number of the batch that comes next."""
    if store.latest is None:
        return state, 0
    if not resume:
        raise ValueError(f"there are checkpoints up to step {store.latest} already; give --resume, or another --out")
    state, record = store.restore(described(state, shardings))
    return state, record["position"]


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come; inside the block it does not end the process."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def _learning_share(trained: Params, frozen: Params) -> float:
    """The part of the transformer's weights that learns."""

    def size(tree: Params) -> int:
        paths = flatten(tree).items()
        return sum(math.prod(leaf.shape) for path, leaf in paths if path.startswith("params/dit/"))

    total = size(trained) + size(frozen)
    return size(trained) / total if total else 0.0
