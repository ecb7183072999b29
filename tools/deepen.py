"""A transformer with more blocks that computes the same: python tools/deepen.py WEIGHTS OUT --after 1,3,5

After each block named, counted from 0, comes a copy of it whose outputs are zero: what it adds is nothing until it has been
trained, and what it computes inside is of use from the start (block expansion, LLaMA Pro, arXiv 2401.02415).
OUT gets WEIGHTS' other networks as they are; train on with --set weights=OUT --set "fresh=()" --set model.dit.layers=N.
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from kavatar_jax.checkpoint.bridge import unflatten
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.checkpoint.weights import read_config, save_component
from kavatar_jax.config import DiTConfig

OUTPUTS = ("self_attn/o/", "cross_attn/o/", "down/", "hear/")  # of a block, to be added to its tokens


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--after", required=True, metavar="NUMBERS", help="blocks that are doubled, with commas between"
    )
    arguments = parser.parse_args(words)
    try:
        layers = deepen(arguments.weights, arguments.out, read_numbers(arguments.after))
    except ValueError as error:
        print(f"deepen: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out / 'dit'}: {layers} blocks")
    return 0


def read_numbers(words: str) -> list[int]:
    try:
        numbers = [int(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"--after {words} is not numbers of blocks with commas between, as in 1,3,5") from None
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"--after {words} names a block twice")
    return numbers


def deepen(weights: Path, out: Path, after: list[int]) -> int:
    """Write the deeper transformer and copy the rest; the number of blocks."""
    config = read_config(weights / "dit", DiTConfig)
    beyond = [number for number in after if not 0 <= number < config.layers]
    if beyond:
        raise ValueError(f"--after names block {beyond[0]}, and {weights} has 0 to {config.layers - 1}")
    if out.exists():
        raise ValueError(f"{out} exists; name a folder that does not")
    order = sorted([*range(config.layers), *after])
    added = [place for place in range(1, len(order)) if order[place] == order[place - 1]]
    tensors = Tensors(weights / "dit" / "model.safetensors")
    arrays = {path: np.array(tensors[path]) for path in tensors}
    for path, array in arrays.items():
        if path.startswith("blocks/"):
            deeper = array[order]
            if any(path.startswith(f"blocks/{name}") for name in OUTPUTS):
                deeper[added] = 0
            arrays[path] = deeper
    shutil.copytree(weights, out, ignore=shutil.ignore_patterns("dit"))
    save_component(unflatten(arrays), replace(config, layers=len(order)), out / "dit")
    return len(order)


if __name__ == "__main__":
    sys.exit(main())
