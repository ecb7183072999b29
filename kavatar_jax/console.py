"""What the commands share: a display of progress, and programs that are compiled once for all runs."""

import time
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# bytes of compiled programs that are kept: hundreds of the largest ones, which are tens of megabytes each
CACHE_LIMIT = 8 * 2**30


def keep_compiled_programs() -> None:
    """Programs compiled once serve later runs, unless the user has a cache of their own. Beyond CACHE_LIMIT those that were
    not used for longest are deleted."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "kavatar_jax" / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", CACHE_LIMIT)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class Display:
    """A bar per stage with the time left; also how long each stage took. Called as a Report."""

    def __init__(self, console: Console):
        columns = (TextColumn("{task.description:>22}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._tasks: dict[str, int] = {}
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *_):
        self._progress.stop()
