"""The table of docs/performance.md: python tools/aot_table.py --out DIR [--only WORD ...] [--table]

Compiles one program after the other for slices and GPUs that are not there, the most telling first; each leaves a JSON
under DIR, and what has left one is not done again. --only: cells whose name has every WORD. --table: only print what there
is. Needs libtpu, and for GPUs JAX's CUDA plug-in, as docs/performance.md says.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SIZES = {"480p": "832x480", "720p": "1280x720", "1080p": "1920x1088"}
# sixteen as their names count: chips, but cores of a v5p and of a tpu7x
SLICES = {"v5e-16": "v5e:4x4", "v5p-16": "v5p:2x2x2", "v6e-16": "v6e:4x4", "tpu7x-16": "tpu7x:2x2x2"}
GPUS = {"h100": "h100", "h100-8": "h100:8"}
PODS = {"v5e-256": "v5e:16x16", "v5p-128": "v5p:4x4x4", "v6e-256": "v6e:16x16", "tpu7x-128": "tpu7x:4x4x4"}
CONFIGS = {
    "1.3B": ("stableavatar", "train_stableavatar"),
    "14B": ("stableavatar:fourteen_b", "train_stableavatar:full"),
}
SMALL = ("v5e", "v6e")  # chips on which the 14B's weights do not lie whole


class Cell(NamedTuple):
    task: str
    model: str
    size: str
    slice: str

    @property
    def name(self) -> str:
        return "_".join(self)

    @property
    def command(self) -> list[str]:
        topology = (SLICES | GPUS | PODS)[self.slice]
        mesh = {"denoise": "-1 1 1 1", "decode": "-1 1 1 1", "train": "1 -1 1 1"}[self.task]
        if self.task == "denoise" and self.model == "14B" and topology.startswith(SMALL):
            mesh = "1 -1 1 1"
        if self.task == "train" and self.model == "14B" and self.slice == "v5e-256":
            mesh = "1 -1 4 1"  # a clip over four chips; one chip has no room for it
        config = CONFIGS[self.model][self.task == "train"]
        fixed = ["--config", config, "--task", self.task, "--size", SIZES[self.size], "--topology", topology]
        return [sys.executable, "-m", "tools.bench", "aot", *fixed, "--mesh", *mesh.split()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = [cell for cell in cells() if all(word in cell.name for word in arguments.only)]
    failed = 0
    for cell in wanted:
        file = arguments.out / f"{cell.name}.json"
        if not arguments.table and not file.is_file():
            print(cell.name, file=sys.stderr, flush=True)
            failed += (
                subprocess.run([*cell.command, "--json", str(file)], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
                != 0
            )
    print("\n".join(rows(arguments.out, wanted)))
    return int(failed > 0)


def cells() -> list[Cell]:
    """Every cell, by what a day without chips learns most from. Decoding is the same for both models."""
    found = []
    for slices in (SLICES, GPUS, PODS):
        for size in SIZES:
            for task, models in (("denoise", CONFIGS), ("decode", ["1.3B"]), ("train", CONFIGS)):
                found += [Cell(task, model, size, name) for model in models for name in slices]
    return found


def rows(folder: Path, wanted: list[Cell]) -> list[str]:
    """Markdown, a line for each cell that was compiled."""
    lines = [
        "| task | model | size | slice | mesh | arguments GiB | peak GiB | of | sent MB | TFLOP | to expected | roofline s "
        "| bound by | utilisation at most | compile s |",
        "|" + "---|" * 15,
    ]
    for cell in wanted:
        file = folder / f"{cell.name}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text())
        mesh = " ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1)
        start = f"| {cell.task} | {cell.model} | {cell.size} | {cell.slice} | {mesh} |"
        if "needs" in found:
            lines.append(f"{start} does not fit: {found['needs']} |")
            continue
        start += "".join(f" {found[f'{name}_bytes'] / 2**30:.2f} |" for name in ("argument", "peak", "chip"))
        if "unread" in found:
            lines.append(f"{start} not read | | | | | | {found['compile_seconds']:.0f} |")
            continue
        sent = ", ".join(f"{kind} {bytes_ / 1e6:,.1f}" for kind, bytes_ in found["sent"].items()) or "nothing"
        lines.append(
            f"{start} {sent} | {found['program_flops'] / 1e12:.1f} |"
            f" {found['program_to_expected']:.3f} | {found['roofline_seconds']:.3g} | {found['bound_by']} |"
            f" {found['utilisation_bound']:.2f} | {found['compile_seconds']:.0f} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
