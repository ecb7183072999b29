"""Between checkpoint layouts and our weights directory: python tools/convert_checkpoint.py SRC DST [--to LAYOUT]

To ours: SRC is the tree of the StableAvatar release (`huggingface-cli download FrancisRing/StableAvatar`), a folder of
Wan2.1 in its own layout or in that of diffusers, one model's folder of transformers, such as a speech encoder, one file with
a transformer alone, or the folder of a training run of ours. Which it is, is told from its files. From ours: --to diffusers,
wan, stableavatar, or transformers, a speech encoder alone; DST is a new folder. --lora FILE[:SCALE] merges LoRA files into
the transformer of SRC, whatever its layout, ours included, on the way to ours.
Every part is checked before any is written: all keys in both directions, all shapes. Then tensors are read one at a time
and keep their dtype. A part bears its name in DST only once it is whole.
"""

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from kavatar_jax.cascade.weights import read_lora_files
from kavatar_jax.checkpoint.bridge import Mismatch, layers_as_in, placements
from kavatar_jax.checkpoint.files import Tensors, read_json
from kavatar_jax.checkpoint.lora import Changes
from kavatar_jax.checkpoint.manifest import note
from kavatar_jax.checkpoint.shards import is_there, open_tensors
from kavatar_jax.checkpoint.weights import (
    NO_CHANGES,
    convert_component,
    replacing,
    stored_dtypes,
)
from kavatar_jax.config import load_config
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.models.names import ORIGINAL, Names
from kavatar_jax.types import Params
from tools.export import LAYOUTS, export
from tools.layouts import CONFIGS, FILES, PARTS, TRANSFORMERS, Place, detect
from tools.ours import merge, take_run
from tools.pipeline import check_pipeline

PUBLISHED = ("stableavatar", "stableavatar:fourteen_b")  # configs whose networks a file is compared with
HEAD_WIDTH = 128  # of every published Wan
ENDS = 2 * 257  # tokens of the first and the last frame, in FLF2V
GIGABYTE = 10**9


class Network(NamedTuple):
    """A network ready to be converted."""

    path: Path
    names: Names
    tensors: Tensors
    config: Any
    wanted: Params


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--to", choices=["kavatar", *LAYOUTS], default="kavatar", help="layout to write")
    parser.add_argument(
        "--transformer", default="square",
        help="of StableAvatar: square (512x512), rec-vec (832x480, 480x832), or, to be read, a file of your own",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to convert")
    parser.add_argument("--image-heads", type=int, help="for image encoders other than the released one")
    parser.add_argument("--shard-size", type=float, default=5, help="GB of a file, from which on it is cut into shards")
    parser.add_argument(
        "--rest", type=Path, help="to write a release: a folder of it, for the tensors that ours has no use for"
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]", help="merged into the transformer"
    )
    parser.add_argument("--step", type=int, help="of a training run: which checkpoint, the newest unless given")
    parser.add_argument("--weights-of", choices=["ema", "raw"], default="", help="of a training run: averages or not")
    parser.add_argument("--lora-unused", choices=["refuse", "ignore"], default="refuse")
    a = parser.parse_args()
    try:
        if a.to == "kavatar":
            convert(
                a.source, a.destination, transformer=a.transformer, only=a.only, image_heads=a.image_heads,
                loras=a.lora, unused=a.lora_unused, step=a.step, weights_of=a.weights_of,
            )  # fmt: skip
        elif a.lora:
            raise ValueError("--lora goes --to kavatar; write the weights directory that comes of it in a second step")
        else:
            size = int(a.shard_size * GIGABYTE)
            export(
                a.source, a.destination, a.to,
                transformer=a.transformer, only=a.only, shard_size=size, rest=a.rest,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted; no part that is not whole was left under its name", file=sys.stderr)
        return 130
    return 0


def convert(
    source: Path, destination: Path, *,
    transformer: str = "square", only: list[str] | None = None, image_heads: int | None = None,
    loras: Sequence[str] = (), unused: str = "refuse", step: int | None = None, weights_of: str = "",
) -> None:  # fmt: skip
    """Convert every part that the source's layout has, or those in `only`, into our weights directory.

    transformer: "square", "rec-vec" or the path of any other file with a transformer of this kind
    image_heads: heads of the image encoder where they are not 80 wide; its file does not say
    loras: FILE or FILE:SCALE, merged into the transformer; unused: what to do with tensors there that nothing is for
    step, weights_of: of a training run, as training.learnt.open_run
    ValueError says all that is missing or does not fit, one line for each part, before anything is written.
    """
    console = Console(stderr=True)
    layout, reason, known = detect(source)
    console.print(f"{layout}: {reason}", soft_wrap=True)
    if layout == "run":
        return take_run(source, destination, console, step=step, kind=weights_of, only=only, loras=loras, unused=unused)
    if step is not None or weights_of:
        raise ValueError(f"--step and --weights-of are for the folder of a training run, and {source} is none")
    if layout == "kavatar" and loras:
        return merge(source, destination, console, only=only, loras=loras, unused=unused)
    if layout == "kavatar":
        raise ValueError(f"{source} is a weights directory of ours; say what to make of it: --to {', '.join(LAYOUTS)}")
    if layout == "stableavatar":
        found = find_files(source, transformer, only or list(FILES))
    else:
        folder = source if source.is_dir() else source.parent
        check_pipeline(folder, console)
        found = _find_parts(folder, layout, known, only)
    for name in found.keys() - COMPONENTS.keys():
        read_json(found[name])
    networks, problems = {}, []
    for name in found.keys() & COMPONENTS.keys():
        try:
            networks[name] = _open_network(name, found[name], known[name], source, image_heads)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(sorted(problems)))
    if loras and "dit" not in networks:
        raise ValueError(f"--lora {loras[0]} is for a transformer, and none is converted")
    changes = read_lora_files(loras, networks["dit"].config, unused=unused) if loras else NO_CHANGES
    for name, path in found.items():
        broken = set()
        with console.status(f"converting {name}") as status:
            if name in networks:
                added = changes if name == "dit" else NO_CHANGES
                broken = _convert_network(name, networks[name], destination / name, status, added)
            else:
                with replacing(destination / name) as partial:
                    shutil.copytree(path.parent, partial, dirs_exist_ok=True)
        console.print(f"{name:10} from {path}", soft_wrap=True)
        if broken:
            console.print(f"[red]{name:10} has NaN or Inf in {', '.join(sorted(broken))}", soft_wrap=True)
        files = [file for file in (destination / name).rglob("*") if file.is_file()]
        at = os.path.relpath(path, source if source.is_dir() else source.parent)
        note(destination, "kavatar", {name: at}, files)


def _find_parts(source: Path, layout: str, known: dict[str, Place], only: list[str] | None) -> dict[str, Path]:
    """The parts that are there; ValueError if one of `only` is not."""
    strange = sorted(set(only or ()) - known.keys())
    if strange:
        raise ValueError(f"{layout} has no {', '.join(strange)}; it has {', '.join(known)}")
    found = {name: place.locate(source) for name, place in known.items() if not only or name in only}
    missing = [f"{name} ({path})" for name, path in found.items() if not is_there(path)]
    if missing and only:
        raise ValueError(f"{source} has not all of --only; missing: {', '.join(missing)}")
    return {name: path for name, path in found.items() if is_there(path)}


def find_files(source: Path, transformer: str, parts: list[str]) -> dict[str, Path]:
    """Where each part lies in a released tree; ValueError lists all that are not there."""
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    if transformer not in TRANSFORMERS and "dit" in parts and not Path(transformer).is_file():
        raise ValueError(f"--transformer {transformer} is neither a file nor {' or '.join(TRANSFORMERS)}")
    found, missing = {}, []
    for name in parts:
        candidates = [source / path for path in FILES[name]]
        if name == "dit":
            candidates = [source / TRANSFORMERS[transformer] if transformer in TRANSFORMERS else Path(transformer)]
        there = [path for path in candidates if path.is_file()]
        lacking = [] if there else [" or ".join(map(str, candidates))]
        lacking += [str(source / CONFIGS[name])] if name in CONFIGS and not (source / CONFIGS[name]).is_file() else []
        if lacking:
            missing.append(f"{name} ({' and '.join(lacking)})")
        else:
            found[name] = there[0]
    if missing:
        rest = f". To convert the rest: --only {' '.join(found)}" if found else ""
        raise ValueError(f"{source} is not a complete released tree; missing: {', '.join(missing)}{rest}")
    return found


def _open_network(name: str, path: Path, place: Place, source: Path, image_heads: int | None) -> Network:
    """Open a network's file and hold it against its table: ValueError if they differ, and no tensor read."""
    names, role = place.names, COMPONENTS[name].role
    assert names is not None
    described = read_json(source / place.config) if place.config else {}
    if place.config and (lacking := [field for field in names.needs if field not in described]):
        raise ValueError(f"{source / place.config} has no {', '.join(lacking)}")
    if name == "image" and image_heads is not None:
        described = described | {"num_heads": image_heads}
    tensors = open_tensors(path).stripped(place.prefix)
    if name == "dit" and place.config is None:  # one file alone, which does not say
        described = {"num_heads": next(iter(tensors.shapes.get("patch_embedding.bias", [0]))) // HEAD_WIDTH}
    try:
        config = names.config_of(tensors.shapes, described)
        _check_heads_and_kind(name, config, names)
        if names is not ORIGINAL["dit"]:  # whose config.json is of the transformer that it was tuned from
            names.compare(described, config)
        wanted = abstract(name, config)
        dtypes = set(stored_dtypes(tensors, names.rows, wanted, unused=names.unused).values())
    except (TypeError, ArithmeticError) as error:  # from shapes traced through the network
        said = ValueError(f"its sizes contradict each other: {str(error).splitlines()[0]}")
        raise ValueError(f"{path} does not hold {role}: {_amiss(name, names, tensors, said)}") from None
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} does not hold {role}: {_amiss(name, names, tensors, error)}") from None
    dtype = str(dtypes.pop()) if len(dtypes) == 1 else "float32"
    return Network(path, names, tensors, dataclasses.replace(config, param_dtype=dtype), wanted)


def _check_heads_and_kind(name: str, config: Any, names: Names) -> None:
    heads, width = config.heads if name in ("dit", "image", "speech") else 1, config.width
    if type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(f"a number of heads of {heads!r} does not divide its width {width}")
    if names is ORIGINAL["dit"] and (config.audio is None or config.image_width is None):
        raise ValueError("it does not listen to speech or does not see a portrait: it is another Wan model")


def _amiss(name: str, names: Names, tensors: Tensors, error: Exception) -> Exception:
    """`error`, which reading a config off the file led to, or what says more: a comparison with a published network.

    Where a tensor that sizes are read off is itself missing or wrong, `error` says little or accuses the others. The
    published network is taken with as many layers as the file has; its sizes count if most of the file's are the same.
    """
    many = len(tensors.shapes) // 2

    def compare(config: Any) -> Mismatch:
        wanted = layers_as_in(tensors.shapes, names.rows, abstract(name, config))
        try:
            placements(tensors.shapes, names.rows, wanted, unused=names.unused)
        except Mismatch as found:
            return found if len(found.wrong) < many else Mismatch(found.missing, found.left_over, [])
        return Mismatch([], [], [])

    def size(problem: Mismatch) -> tuple[int, int]:
        return len(problem.missing) + len(problem.left_over), len(problem.wrong)

    nearest = min(map(compare, _published(name, names)), key=size, default=Mismatch([], [], []))
    says_more = not isinstance(error, Mismatch) or size(nearest) < size(error)
    return nearest if any(size(nearest)) and says_more else error


def _published(name: str, names: Names) -> list[Any]:
    """Configs of published networks that a file in these names may hold."""
    if names.model is not COMPONENTS[name].model:
        return []
    found = [getattr(load_config(config), name) for config in PUBLISHED]
    if name != "dit" or names is ORIGINAL["dit"]:
        return found
    seeing = [dataclasses.replace(config, audio=None) for config in found]
    both_ends = [dataclasses.replace(config, image_positions=ENDS) for config in seeing]
    blind = [dataclasses.replace(config, image_width=None, in_channels=config.out_channels) for config in seeing]
    return seeing + both_ends + blind


def _convert_network(name: str, network: Network, folder: Path, status, changes: Changes) -> set[str]:
    def report(_, done: int, total: int) -> None:
        status.update(f"converting {name}: {100 * done // total} %")

    return convert_component(
        network.tensors, network.names.rows, network.wanted, network.config, folder,
        unused=network.names.unused, changes=changes, source=network.path.name, report=report,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
