"""Measure speed and memory: python tools/bench.py cpu [--only block step vae] [--json FILE]
                            python tools/bench.py aot [--config NAME] [--task denoise] [--topology v5e:2x2] [--mesh 4 1 1 1]
                            python tools/bench.py convert [--config wan:i2v_720p] [--disk 12] [--folder DIR]

cpu: our networks beside other implementations of them on two cores of this machine, in turns, as ratios of the time that
they take. Other work on the machine shows in the range of the ratios; --cores 1 takes the time of one core computing
instead, which is steadier. Needs the extra `parity`, but for `step`.
aot: what a step of sampling, decoding or training needs of TPUs or H100s that are not there, and their least time for it.
Needs libtpu, or for H100s JAX's CUDA plug-in, as docs/performance.md says.
convert: the converter's time and peak memory beside a copy of the same bytes, on synthesised weights of a transformer
with as many layers as fit into that many gigabytes of the disk; they are deleted afterwards.
Exit 0 whatever the ratios are.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console
from rich.table import Table

from tools.benchmarks import aot as ahead

LIMITS = {"block": 1.1, "step": 1.0, "vae": 1.1}  # ratios, ours to theirs, that we are content with


class Result(NamedTuple):
    """One line of the table. Seconds; ratio: ours to theirs, and its range; agree: both give the same numbers."""

    name: str
    case: str
    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]
    agree: bool
    note: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="speed beside other implementations")
    cpu.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS))
    cpu.add_argument("--rounds", type=int, default=5)
    cpu.add_argument("--cores", type=int, default=2)
    aot = commands.add_parser("aot", help="memory on absent chips")
    ahead.add_arguments(aot)
    conversion = commands.add_parser("convert", help="the converter beside a copy of the bytes")
    conversion.add_argument("--config", default="wan:i2v_720p")
    conversion.add_argument("--disk", type=float, default=12, help="gigabytes that may be written")
    conversion.add_argument("--folder", type=Path, default=Path("bench_convert"), help="a new one, deleted afterwards")
    for command in (cpu, aot, conversion):
        command.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    try:
        report = {"cpu": measure_cpu, "aot": measure_aot, "convert": measure_convert}[arguments.command](arguments)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure_cpu(arguments) -> dict:
    _keep_to(arguments.cores)
    console = Console(width=150)
    machine = {"processor": _processor(), "cores": len(_cores()), "load before": os.getloadavg()[0]}
    console.print(machine)
    table = Table("what", "case", "ours s", "theirs s", "ratio", "range", "limit", "verdict", "note")
    results = []
    for name in arguments.only:
        for result in {"block": _block, "step": _step, "vae": _vae}[name](arguments.rounds):
            results.append(result)
            console.print(f"{result.name} {result.case}: {result.ratio:.2f}", style="dim")
            table.add_row(
                name, result.case, f"{result.ours:.3f}", f"{result.theirs:.3f}", f"{result.ratio:.2f}",
                "{:.2f}-{:.2f}".format(*result.spread), f"{LIMITS[name]:g}", _verdict(result), result.note,
            )  # fmt: skip
    machine["load after"] = os.getloadavg()[0]
    console.print(table)
    console.print(machine)
    return {"machine": machine, "results": [result._asdict() | {"limit": LIMITS[result.name]} for result in results]}


def measure_aot(arguments) -> dict:
    report = ahead.measure(arguments)
    Console(width=150).print(ahead.describe(report))
    return report


def measure_convert(arguments) -> list[dict]:
    from tools.benchmarks.convert import measure_conversion

    if arguments.folder.exists():
        raise ValueError(f"there is something at {arguments.folder}; name a folder that is new")
    table = Table("from", "to", "layers", "GB", "s", "CPU s", "copy s", "copy CPU s", "speed beside a copy", "peak GiB")
    rows = list(measure_conversion(arguments.config, arguments.folder, arguments.disk))
    for row in rows:
        table.add_row(
            row["from"], row["to"], str(row["layers"]), f"{row['gigabytes']:.2f}", f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}", f"{row['copy_seconds']:.1f}", f"{row['copy_cpu_seconds']:.1f}",
            f"{row['speed']:.2f}", f"{row['peak_gib']:.2f}",
        )  # fmt: skip
    Console(width=150).print(table)
    return rows


def _block(rounds: int) -> Iterator[Result]:
    """diffusers' WanTransformerBlock at 1.3B's width."""
    _limit_torch()
    from tools.benchmarks.block import transformer_block

    for row in transformer_block(rounds=rounds):
        case = f"{row['tokens']} tokens {row['dtype']}"
        note = f"difference {row['difference']:.1e} sd; its largest product alone {row['product']:.2f}"
        yield Result("block", case, row["ours"], row["theirs"], row["ratio"], row["spread"], row["agree"], note)


def _step(rounds: int) -> Iterator[Result]:
    """The released order of work: window by window, speech encoded anew."""
    import jax

    from kavatar_jax.parallel.mesh import make_mesh
    from tools.benchmarks.step import sampling_step

    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        for row in sampling_step(rounds=rounds):
            case = f"{row['size']} {row['windows']} windows"
            shares = f"speech once x{row['speech']:.2f}, batching x{row['batching']:.2f}"
            note = f"{shares}, difference {row['difference']:.1e} sd"
            yield Result("step", case, row["ours"], row["theirs"], row["ratio"], row["spread"], row["agree"], note)


def _vae(rounds: int) -> Iterator[Result]:
    """diffusers' AutoencoderKLWan."""
    _limit_torch()
    from tools.benchmarks.vae import vae_decode

    row = vae_decode(rounds=rounds)
    case = "latents {}x{}x{} float32".format(*row["latents"])
    note = f"difference {row['difference']:.1e}"
    agree = row["difference"] <= 1e-3  # of frames in [-1, 1]
    yield Result("vae", case, row["seconds"], row["diffusers_seconds"], row["ratio"], row["spread"], agree, note)


def _verdict(result: Result) -> str:
    if not result.agree:
        return "[red]differs"
    return "[green]met" if result.ratio <= LIMITS[result.name] else "[yellow]over"


def _limit_torch() -> None:
    try:
        import torch
    except ImportError:
        raise ValueError("this needs torch and diffusers; pip install '.[parity]', or take --only step") from None
    torch.set_num_threads(len(_cores()))


def _keep_to(cores: int) -> None:
    """JAX starts as many threads as the process may use cores."""
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"{platform.system()} cannot keep a process to some cores; measure on Linux")
    if cores < 1:
        raise ValueError(f"--cores is {cores}; it must be at least 1")
    os.sched_setaffinity(0, sorted(_cores())[:cores])


def _cores() -> set[int]:
    return os.sched_getaffinity(0)


def _processor() -> str:
    """Its name, and whether it multiplies bfloat16 tiles, which decides how fast oneDNN is in bfloat16."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0] + (", AMX" if any("amx_bf16" in line for line in lines) else "")


if __name__ == "__main__":
    sys.exit(main())
