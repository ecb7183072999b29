"""What a run says about itself: a line on the screen, a line of JSON and TensorBoard events, every few steps."""

import json
import resource
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from rich.console import Console

from kavatar_jax.training import flops
from kavatar_jax.training.config import LogConfig
from kavatar_jax.training.events import EventWriter
from kavatar_jax.training.step import Metrics
from kavatar_jax.training.tasks import Work


class Log:
    """Means since the last line. The first process writes OUT/log.jsonl and OUT/events; the others keep silent.

    In a line: loss and what the task names beside it, loss_0.0-0.2 and so on by noise level, gradient_norm,
    learning_rate, seconds a step, tokens_per_second, mfu where the device's peak is known, memory_gib of the device (of
    the process on a CPU).
    """

    def __init__(self, config: LogConfig, out: Path, steps: int):
        self._config, self._steps, self._speaks = config, steps, jax.process_index() == 0
        self._console, self._waiting, self._since = Console(stderr=True), [], time.perf_counter()
        self._peak = (config.peak or flops.peak(jax.devices()[0])) * jax.device_count()
        if self._speaks:
            self._lines = open(out / "log.jsonl", "a")
            self._events = EventWriter(out / "events")

    def take(self, step: int, metrics: Metrics, work: Work) -> None:
        """Metrics of step number `step`, counted from 1, on the host, and the work of all its clips."""
        self._waiting.append((metrics, work))
        if step % self._config.every == 0:
            self._say(step)

    def picture(self, step: int, path: Path | None) -> None:
        """A contact sheet, from the process that has one."""
        if path is None:
            return
        with Image.open(path) as sheet:
            self._events.image("samples", step, path.read_bytes(), width=sheet.width, height=sheet.height)
        self.word(f"step {step}: {path}")

    def word(self, text: str) -> None:
        if self._speaks:
            self._console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._speaks:
            self._lines.close()
            self._events.close()

    def _say(self, step: int) -> None:
        now = time.perf_counter()
        values = _summary(self._waiting, now - self._since, self._config.bands, self._peak)
        self._waiting, self._since = [], now
        if not self._speaks:
            return
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.scalar(name, step, value)
        self._events.flush()
        shown = (
            "loss",
            "lip_error",
            "gradient_norm",
            "learning_rate",
            "seconds",
            "tokens_per_second",
            "mfu",
            "memory_gib",
        )
        line = "  ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)
        self.word(f"step {step}/{self._steps}  {line}")


def _summary(waiting: list[tuple[Metrics, Work]], seconds: float, bands: int, peak: float) -> dict[str, float]:
    metrics, works = [entry[0] for entry in waiting], [entry[1] for entry in waiting]
    values = {name: float(np.mean([m.means[name] for m in metrics])) for name in metrics[0].means if name != "sigma"}
    sums, counts = np.sum([m.bands for m in metrics], axis=0)
    for i in range(bands if "sigma" in metrics[0].means else 0):
        if counts[i]:
            values[f"loss_{i / bands:.1f}-{(i + 1) / bands:.1f}"] = float(sums[i] / counts[i])
    values["gradient_norm"] = float(np.mean([m.gradient_norm for m in metrics]))
    values["learning_rate"] = float(metrics[-1].learning_rate)
    values["seconds"] = seconds / len(waiting)
    values["tokens_per_second"] = sum(work.tokens for work in works) / seconds
    total = sum(work.flops for work in works)
    if peak and total:
        values["mfu"] = total / seconds / peak
    values["memory_gib"] = _memory() / 2**30
    return values


def _memory() -> float:
    """Greatest bytes in use so far: of the busiest local device, or of this process where devices do not tell."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    used = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(used) if used else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
