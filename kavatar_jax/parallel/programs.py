"""The programs of a pipeline: functions that are jitted where they are written, and that can be compiled without being run.

Within `compiling` a call of a program compiles it for the shapes and places of its arguments, which need not be there
(jax.ShapeDtypeStruct), and returns zeros of its outputs' shapes. So a pipeline that is run on made-up inputs compiles what
it would run, in JAX's persistent cache, without its weights.

Threads that share several devices start their programs one at a time, since each device runs what it is given in the order
it is given: two programs that came to two devices in different orders would wait for each other. The devices of a CPU share
the threads of its cores, of which two programs could each have some and wait for more; so there one is finished first.
"""

import contextlib
import contextvars
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from kavatar_jax.parallel.mesh import platform

Compiled = Callable[[str, float], None]  # told of each program that was compiled: its name, seconds

_compiling: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("compiling", default=None)
_starting = threading.RLock()  # one program may be part of another


class Program:
    """A jitted function; whatever else jax.jit offers (lower, trace, ...) is there too."""

    def __init__(self, function: Callable, **options):
        self._jitted = jax.jit(function, **options)
        functools.update_wrapper(self, function)

    def __call__(self, *arguments, **named):
        call = _compiling.get() or _run
        if jax.sharding.get_abstract_mesh().size <= 1:
            return call(self._jitted, arguments, named)
        with _starting:
            done = call(self._jitted, arguments, named)
            return jax.block_until_ready(done) if platform() == "cpu" else done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


def program(**options) -> Callable[[Callable], Program]:
    """A decorator like jax.jit with the same options."""
    return functools.partial(Program, **options)


@contextlib.contextmanager
def compiling(report: Compiled) -> Iterator[None]:
    """Every program that is called in here is compiled, once for each kind of arguments, and not run."""
    seen: dict[Any, Any] = {}

    def compile_(jitted, arguments, named):
        leaves, tree = jax.tree.flatten((arguments, named))
        kind = (jitted, tree, *map(_kind, leaves))
        if kind not in seen:
            started = time.perf_counter()
            lowered = jitted.lower(*arguments, **named)
            compiled = lowered.compile()
            report(jitted.__name__, time.perf_counter() - started)
            seen[kind] = lowered.out_info, compiled.output_shardings
        return jax.tree.map(_zeros, *seen[kind])

    token = _compiling.set(compile_)
    try:
        yield
    finally:
        _compiling.reset(token)


def _run(jitted, arguments, named):
    return jitted(*arguments, **named)


def _kind(leaf):
    if not hasattr(leaf, "shape"):
        return leaf
    return leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)


def _zeros(info, sharding):
    return jax.device_put(np.zeros(info.shape, info.dtype), sharding)
