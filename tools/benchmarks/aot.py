"""Real programs compiled for chips that are not there: what they need of each device, and the least time that takes.

TPUs need libtpu, which compiles for any slice on a host without one, H100s the CUDA plug-in of JAX and cuDNN's library. What
does not fit a TPU does not compile, and the report says by how much; for a GPU it compiles.
"""

import argparse
import dataclasses
import re
import time

import jax
from rich.table import Table

from kavatar_jax.config import Config, load_config, set_fields
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.training.config import TrainConfig
from tools.benchmarks import programs
from tools.benchmarks.absent import INSTALL_CUDA, absent_devices
from tools.benchmarks.hlo import cost_of
from tools.benchmarks.roofline import CHIPS, roofline

TASKS = {task.__name__: task for task in (programs.read, programs.denoise, programs.decode, programs.train)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="stableavatar", help="a run's; with --task train, a training run's")
    parser.add_argument("--set", action="append", default=[], dest="fields", help="replace a field: dit.layers=2")
    parser.add_argument("--size", help="width and height of the video, as in 832x480, in place of the config's")
    parser.add_argument("--task", choices=TASKS, default="denoise")
    parser.add_argument(
        "--topology", default="v5e:2x2", help="as in v5e:4x4, v5p:2x2x4, v6e:4x4, tpu7x:2x2x4, h100, h100:8"
    )
    parser.add_argument("--slices", type=int, default=1, help="so many such slices of TPUs, joined by a slower network")
    parser.add_argument(
        "--mesh", type=int, nargs=4, default=[-1, 1, 1, 1], metavar=("DATA", "FSDP", "CONTEXT", "TENSOR")
    )
    parser.add_argument(
        "--count", type=int, help="texts, windows, clips, or latent frames to decode; else one for each slot"
    )


def measure(arguments) -> dict:
    """Everything is of one device. ValueError for a config that is not for the task, or a slice that does not exist."""
    config, task = resize(set_fields(load_config(arguments.config), arguments.fields), arguments.size), arguments.task
    if isinstance(config, TrainConfig) != (task == "train"):
        raise ValueError(f"{config.name} is not a config for the task {task!r}; train_stableavatar is for training")
    topology, slices = arguments.topology, arguments.slices
    devices = absent_devices(topology, slices)
    platform = {"gpu": "cuda"}.get(devices[0].platform, devices[0].platform)
    report = {"config": config.name, "task": task, "topology": topology, "slices": slices, "devices": len(devices)}
    with jax.set_mesh(make_mesh(*arguments.mesh, devices=devices)):
        started = time.perf_counter()
        program = _trace(task, config, arguments.count)
        report["mesh"] = dict(program.mesh.shape)
        try:
            compiled = program.traced.lower(lowering_platforms=(platform,)).compile()
        except jax.errors.JaxRuntimeError as error:
            return report | {"fits": False, "needs": _refusal(error)}
        report["compile_seconds"] = time.perf_counter() - started
    return report | _examine(compiled, program, topology.split(":")[0], _head(config), len(devices))


def resize(config, size: str | None):
    """The config for videos, or clips, of another size."""
    if size is None:
        return config
    if not re.fullmatch(r"\d+x\d+", size):
        raise ValueError(f"--size {size} is not a width and a height; write --size 832x480")
    width, height = map(int, size.split("x"))
    if isinstance(config, Config):
        return dataclasses.replace(config, width=width, height=height)
    bucket = dataclasses.replace(config.data.buckets[0], width=width, height=height, closeup=1)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=(bucket,)))


def describe(report: dict) -> Table:
    table = Table("of one device", "value", title="{config} {task} on {topology}".format(**report))
    for name, value in report.items():
        if name.endswith("bytes"):
            value = f"{value / 2**30:.2f} GiB"
        elif name.endswith("flops"):
            value = f"{value / 1e12:.2f} T"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        table.add_row(name, str(value))
    return table


def _trace(task: str, config, count: int | None) -> programs.Program:
    try:
        return TASKS[task](config, count)
    except RuntimeError as error:  # of JAX, where it asks for the version of a library that is not there
        if "cuDNN" not in str(error):
            raise
        raise ValueError(f"attention on a GPU is cuDNN's: {error} {INSTALL_CUDA}") from None


def _examine(compiled, program: programs.Program, kind: str, head: int, devices: int) -> dict:
    memory, chip = compiled.memory_analysis(), CHIPS[kind]
    assert memory is not None, "the compiler gave no memory analysis"
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    report = {
        "fits": peak + program.kept <= chip.memory,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
        "kept_bytes": program.kept,
        "chip_bytes": chip.memory,
        "host_bytes": memory.host_argument_size_in_bytes,
    }
    try:
        cost = cost_of(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:  # the compiler is newer than jaxlib and writes what that cannot read
        return report | {"unread": str(error).splitlines()[0]}
    times = roofline(cost, chip, head=head)
    return report | {
        "kernels": cost.kernel_calls,
        "collectives": dict(cost.counts),
        "sent": dict(cost.sent),
        "sent_between_slices": cost.between_slices,
        "kernel_flops": cost.kernels,
        "program_flops": cost.flops,
        "model_flops": program.flops / devices,
        "program_to_expected": cost.flops * devices / program.program,
        "compute_seconds": times.compute,
        "memory_seconds": times.memory,
        "interconnect_seconds": times.interconnect,
        "roofline_seconds": times.time,
        "bound_by": times.bound,
        "utilisation_bound": program.flops / devices / chip.flops / times.time,
    }


def _head(config: Config | TrainConfig) -> int:
    net = config.model.dit if isinstance(config, TrainConfig) else config.dit
    return net.width // net.heads


def _refusal(error: Exception) -> str:
    """What the compiler says of memory, in the words of either of its versions, or the error itself if it is another."""
    found = re.search(
        r"Used [\d.]+\w of [\d.]+\w \w+|HLO temporaries \([\d.]+\w\) exceeds [\w ]+\([\d.]+\w\)", str(error)
    )
    if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        raise error
    return found[0]
