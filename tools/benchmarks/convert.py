"""Speed and peak memory of the converter beside a copy of the same bytes, on synthesised weights of published shapes.

Each direction runs in a process of its own, after a copy of what it reads in another; as many layers as the disk is lent.
"""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from kavatar_jax.checkpoint.bridge import reference_shapes
from kavatar_jax.checkpoint.shards import Lazy, write_tensors
from kavatar_jax.config import DiTConfig, load_config
from kavatar_jax.models.components import abstract
from kavatar_jax.models.names import DIFFUSERS, PLAIN_DIT
from tools.convert_checkpoint import convert
from tools.export import export

GIGABYTE = 10**9
SHARD = 5 * GIGABYTE
AT_ONCE = 3  # folders of the same size on the disk: what is read, what is written, and what that is made into
CHUNK = 1 << 24
NAMES = {"diffusers": ("transformer", DIFFUSERS["dit"]), "wan": (".", PLAIN_DIT)}
FILE = "diffusion_pytorch_model.safetensors"


def measure_conversion(config: str, folder: Path, disk: float) -> Iterator[dict]:
    """A row for each direction: seconds, gigabytes, peak GiB, and both of a copy. Everything in `folder` is deleted.

    disk: gigabytes that all files together may take. ValueError if that is too little for one layer.
    """
    dit = _as_deep_as_fits(load_config(config).dit, disk * GIGABYTE / AT_ONCE)
    for layout in NAMES:
        folder.mkdir(parents=True)
        try:
            _synthesise(dit, folder / layout, layout)
            for source, target in ((layout, "kavatar"), ("kavatar", layout)):
                size = _size(folder / source)
                copied = _apart("copy", folder / source, folder / "copy")
                shutil.rmtree(folder / "copy")
                if target == layout:
                    shutil.rmtree(folder / layout)
                converted = _apart(target, folder / source, folder / target)
                yield {
                    "from": source, "to": target, "layers": dit.layers, "gigabytes": size / GIGABYTE, **converted,
                    "copy_seconds": copied["seconds"],
                    "copy_cpu_seconds": copied["cpu_seconds"], "speed": copied["seconds"] / converted["seconds"],
                }  # fmt: skip
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """One direction, in this process: prints what it took."""
    target, source, destination = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    started = time.perf_counter()
    if target == "copy":
        _copy(source, destination)
    elif target == "kavatar":
        convert(source, destination)
    else:
        export(source, destination, target, shard_size=SHARD)
    seconds, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    took = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_gib": usage.ru_maxrss / 2**20}
    print(json.dumps(took))


def _as_deep_as_fits(config: DiTConfig, room: float) -> DiTConfig:
    def size(layers: int) -> int:
        shapes = reference_shapes(PLAIN_DIT.rows, abstract("dit", dataclasses.replace(config, layers=layers)))
        return sum(2 * int(np.prod(shape)) for shape in shapes.values())

    layers = min(config.layers, int((room - size(1)) // (size(2) - size(1))) + 1)
    if layers < 1:
        raise ValueError(
            f"--disk has room for {room / GIGABYTE:.1f} GB at a time; one layer is {size(1) / GIGABYTE:.1f}"
        )
    return dataclasses.replace(config, layers=layers)


def _synthesise(config: DiTConfig, folder: Path, layout: str) -> None:
    """Numbers from one block, again and again: what is in them takes no part in the time."""
    place, names = NAMES[layout]
    (folder / place).mkdir(parents=True)
    shapes = reference_shapes(names.rows, abstract("dit", config))
    block = np.random.default_rng(0).standard_normal(max(int(np.prod(s)) for s in shapes.values()), np.float32)
    block = block.astype(ml_dtypes.bfloat16)
    lazy = {key: Lazy(s, block.dtype, lambda s=s: block[: int(np.prod(s))].reshape(s)) for key, s in shapes.items()}
    write_tensors(folder / place / FILE, lazy, shard_size=SHARD)
    assert names.describe is not None
    (folder / place / "config.json").write_text(json.dumps(names.describe(config)))


def _copy(source: Path, destination: Path) -> None:
    for path in (path for path in source.rglob("*") if path.is_file()):
        target = destination / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb") as reader, open(target, "wb") as writer:
            while chunk := reader.read(CHUNK):
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())


def _apart(target: str, source: Path, destination: Path) -> dict:
    words = [sys.executable, "-m", "tools.benchmarks.convert", target, str(source), str(destination)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise ValueError(f"{target} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
