"""LoRA files between namings, and out of a training run: python tools/convert_lora.py SRC DST --to diffusers|kohya

SRC is a LoRA file of any naming that `kavatar generate --lora` reads, or the folder of a training run of ours, of which the
newest checkpoint is taken. DST is a new .safetensors file. Bits stay as they are. A file is read as one for the transformer
of --weights DIR, our weights directory; a run knows its own.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from kavatar_jax.checkpoint.lora import WRITTEN, Change, read_lora, write_lora
from kavatar_jax.checkpoint.weights import read_config
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.models.names import DIFFUSERS, LORA, ORIGINAL
from kavatar_jax.training.learnt import open_run
from kavatar_jax.types import Params

ROWS = {"diffusers": DIFFUSERS["dit"].rows, "kohya": ORIGINAL["dit"].rows}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--to", choices=WRITTEN, required=True)
    parser.add_argument("--weights", type=Path, help="the weights directory that a LoRA file is for")
    parser.add_argument("--step", type=int, help="of a training run: which checkpoint, the newest unless given")
    parser.add_argument("--weights-of", choices=["ema", "raw"], default="", help="of a training run: averages or not")
    a = parser.parse_args(words)
    try:
        convert(a.source, a.destination, a.to, weights=a.weights, step=a.step, weights_of=a.weights_of)
    except (ValueError, OSError) as error:
        print(f"convert_lora: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def convert(
    source: Path, destination: Path, naming: str, *,
    weights: Path | None = None, step: int | None = None, weights_of: str = "",
) -> None:  # fmt: skip
    """Write the branches of a LoRA file or of a run in another naming; ValueError, and nothing written, for the rest."""
    if destination.suffix != ".safetensors" or destination.exists():
        raise ValueError(f"{destination} is there already or is no .safetensors file; name a new one")
    if source.is_dir():
        branches, params = _of_run(source, step, weights_of)
    elif weights is None:
        raise ValueError(f"--weights DIR is missing: which transformer is {source} for?")
    else:
        branches, params = _of_file(source, weights)
    write_lora(destination, branches, ROWS[naming], params, naming)
    Console(stderr=True).print(f"{len(branches)} branches from {source} to {destination}", soft_wrap=True)


def _of_file(source: Path, weights: Path) -> tuple[dict[tuple[str, int | None], Change], Params]:
    params = abstract("dit", read_config(weights / "dit", *COMPONENTS["dit"].kinds))
    changes, left = read_lora(source, LORA, params)
    other = [name for (name, _), found in changes.items() if len(found) > 1 or found[0].down is None]
    if left or other:
        raise ValueError(
            f"{source} has more than branches of this transformer, which the other naming cannot hold: "
            f"{', '.join(sorted({*left, *other}))}; merge it with tools/convert_checkpoint.py --lora"
        )
    return {home: one for home, (one,) in changes.items()}, params


def _of_run(source: Path, step: int | None, weights_of: str) -> tuple[dict[tuple[str, int | None], Change], Params]:
    run = open_run(source, step=step, kind=weights_of)
    others = [name for name in run.learnt if name != "dit" and run.branches(name)]
    if others:
        raise ValueError(f"{source} has branches of {', '.join(others)} too, for which LoRA files have no names")
    branches = {(path, layer): one for path, layers in run.branches("dit").items() for layer, (one,) in layers.items()}
    if not branches:
        raise ValueError(f"{source} trains no LoRA; take its weights with tools/convert_checkpoint.py")
    beside = sorted(key for key in run.stored if key.startswith(f"{run.kind}/params/"))
    if beside:
        Console(stderr=True).print(
            f"{len(beside)} tensors learn beside the branches; a LoRA file has no place for them"
        )
    return branches, abstract("dit", run.config.model.dit)


if __name__ == "__main__":
    sys.exit(main())
