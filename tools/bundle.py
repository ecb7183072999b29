"""Gather the networks that training runs left behind into one weights directory: python tools/bundle.py OUT FOLDER...

Each FOLDER is a weights directory, complete or not, such as RUN/weights. A network that two of them hold is an error.
With --half numbers are stored in bfloat16, at half the size and a relative error of 2^-9; they are widened when loaded.
Networks that are in OUT already stay, unless a FOLDER brings them anew. With --fill those that are still missing are drawn
from chance as a config describes them, as the demo's portrait encoder is, which nothing trains.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import ml_dtypes

from kavatar_jax.checkpoint.bridge import unflatten
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.checkpoint.weights import read_config, save_component
from kavatar_jax.config import Config, load_config
from kavatar_jax.models.components import COMPONENTS, model_of


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--half", action="store_true", help="store bfloat16")
    parser.add_argument("--fill", metavar="CONFIG", help="draw what is missing, as in --fill demo")
    arguments = parser.parse_args(words)
    try:
        for name, folder in find_networks(arguments.folders).items():
            size = copy(folder / name, arguments.out / name, name, half=arguments.half)
            print(f"{arguments.out / name}: {size / 1e6:.1f} MB, from {folder}")
        if arguments.fill:
            for name in fill(arguments.out, load_config(arguments.fill), half=arguments.half):
                print(f"{arguments.out / name}: drawn from chance")
    except ValueError as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 2
    return 0


def find_networks(folders: list[Path]) -> dict[str, Path]:
    """Which folder holds each network, and the tokenizer."""
    found: dict[str, Path] = {}
    for folder in folders:
        names = [name for name in (*COMPONENTS, "tokenizer") if (folder / name / "config.json").is_file()]
        if not names:
            raise ValueError(f"{folder} holds no network; give weights directories, as RUN/weights")
        for name in names:
            if name in found:
                raise ValueError(f"both {found[name]} and {folder} hold {name}; leave one out")
            found[name] = folder
    return found


def fill(out: Path, config: Config, *, half: bool) -> Iterator[str]:
    """Draw the networks that are not there; their names."""
    for number, name in enumerate(COMPONENTS):
        if not (out / name / "config.json").is_file():
            part = getattr(config, name)
            params = jax.device_get(jax.jit(partial(model_of(name, part).init, part))(jax.random.key(number)))
            if half:
                params = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
            save_component(params, part, out / name)
            yield name


def copy(source: Path, target: Path, name: str, *, half: bool) -> int:
    """One network, or the tokenizer; bytes written."""
    if name == "tokenizer":
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        tensors = Tensors(source / "model.safetensors")
        arrays = {path: tensors[path] for path in tensors}
        if half:
            arrays = {path: array.astype(ml_dtypes.bfloat16) for path, array in arrays.items()}
        save_component(unflatten(arrays), read_config(source, *COMPONENTS[name].kinds), target)
    return sum(file.stat().st_size for file in target.iterdir())


if __name__ == "__main__":
    sys.exit(main())
