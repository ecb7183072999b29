"""Turn a released StableAvatar checkpoint tree into a weights directory: python tools/convert_checkpoint.py SRC DST

SRC holds what `huggingface-cli download FrancisRing/StableAvatar` leaves:
    StableAvatar-1.3B/transformer3d-square.pt, Wan2.1-Fun-V1.1-1.3B-InP/..., wav2vec2-base-960h/
Every part is checked before any is written: all keys in both directions, all shapes. Then tensors are read one at a time
and keep their dtype. A part bears its name in DST only once it is whole.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from kavatar_jax.checkpoint.bridge import Mismatch, layers_as_in, placements
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.checkpoint.weights import convert_component, replacing, stored_dtypes
from kavatar_jax.config import load_config
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.types import Params

BASE = "Wan2.1-Fun-V1.1-1.3B-InP"
SPEECH = "wav2vec2-base-960h"
TRANSFORMERS = {name: f"StableAvatar-1.3B/transformer3d-{name}.pt" for name in ("square", "rec-vec")}
FILES = {  # part -> its file, the first that is there
    "dit": [TRANSFORMERS["square"]],
    "vae": [f"{BASE}/Wan2.1_VAE.pth"],
    "text": [f"{BASE}/models_t5_umt5-xxl-enc-bf16.pth"],
    "image": [f"{BASE}/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"],
    "speech": [f"{SPEECH}/model.safetensors", f"{SPEECH}/pytorch_model.bin"],
    "tokenizer": [f"{BASE}/google/umt5-xxl/tokenizer.json"],
}
CONFIGS = {"dit": f"{BASE}/config.json", "speech": f"{SPEECH}/config.json"}
PUBLISHED = ("stableavatar", "stableavatar:fourteen_b")  # configs whose networks a file is compared with


class Network(NamedTuple):
    """A network ready to be converted."""

    path: Path
    tensors: Tensors
    config: Any
    wanted: Params


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--to", choices=["kavatar"], default="kavatar", help="layout to write")
    parser.add_argument(
        "--transformer", default="square", help="square (512x512), rec-vec (832x480, 480x832), or a file of your own"
    )
    parser.add_argument("--only", nargs="+", choices=FILES, help="parts to convert")
    parser.add_argument("--image-heads", type=int, help="for image encoders other than the released one")
    a = parser.parse_args()
    try:
        convert(a.source, a.destination, transformer=a.transformer, only=a.only, image_heads=a.image_heads)
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
) -> None:  # fmt: skip
    """Convert every part, or those in `only`.

    transformer: "square", "rec-vec" or the path of any other file with a transformer of this kind
    image_heads: heads of the image encoder where they are not 80 wide; its file does not say
    ValueError says all that is missing or does not fit, one line for each part, before anything is written.
    """
    console = Console(stderr=True)
    found = find_files(source, transformer, only or list(FILES))
    networks, problems = {}, []
    for name in found.keys() & COMPONENTS.keys():
        try:
            networks[name] = _open_network(name, found[name], source, image_heads)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(sorted(problems)))
    for name, path in found.items():
        with console.status(f"converting {name}") as status:
            if name in networks:
                _convert_network(name, networks[name], destination / name, status)
            else:
                with replacing(destination / name) as partial:
                    shutil.copytree(path.parent, partial, dirs_exist_ok=True)
        console.print(f"{name:10} from {path}", soft_wrap=True)
        _note_source(destination / "kavatar.json", name, os.path.relpath(path, source))


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
    if "tokenizer" in found:
        _read_json(found["tokenizer"])
    return found


def _open_network(name: str, path: Path, source: Path, image_heads: int | None) -> Network:
    """Open a network's file and hold it against its table: ValueError if they differ, and no tensor read."""
    model, role = COMPONENTS[name].model, COMPONENTS[name].role
    released = _read_json(source / CONFIGS[name]) if name in CONFIGS else {}
    if name == "dit" and "num_heads" not in released:
        raise ValueError(f"{source / CONFIGS[name]} has no num_heads")
    if name == "image" and image_heads is not None:
        released = {"num_heads": image_heads}
    tensors = Tensors(path)
    try:
        config = model.config_of(tensors.shapes, released)
        _check_heads_and_kind(name, config)
        wanted = abstract(name, config)
        dtypes = set(stored_dtypes(tensors, model.TORCH, wanted, unused=model.UNUSED).values())
    except (TypeError, ArithmeticError) as error:  # from shapes traced through the network
        said = ValueError(f"its sizes contradict each other: {str(error).splitlines()[0]}")
        raise ValueError(f"{path} does not hold {role}: {_amiss(name, tensors, said)}") from None
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} does not hold {role}: {_amiss(name, tensors, error)}") from None
    dtype = str(dtypes.pop()) if len(dtypes) == 1 else "float32"
    return Network(path, tensors, dataclasses.replace(config, param_dtype=dtype), wanted)


def _check_heads_and_kind(name: str, config: Any) -> None:
    heads, width = config.heads if name in ("dit", "image", "speech") else 1, config.width
    if type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(f"a number of heads of {heads!r} does not divide its width {width}")
    if name == "dit" and (config.audio is None or config.image_width is None):
        raise ValueError("it does not listen to speech or does not see a portrait: it is another Wan model")


def _amiss(name: str, tensors: Tensors, error: Exception) -> Exception:
    """`error`, which reading a config off the file led to, or what says more: a comparison with a published network.

    Where a tensor that sizes are read off is itself missing or wrong, `error` says little or accuses the others. The
    published network is taken with as many layers as the file has; its sizes count if most of the file's are the same.
    """
    model, many = COMPONENTS[name].model, len(tensors.shapes) // 2

    def compare(config: str) -> Mismatch:
        wanted = layers_as_in(tensors.shapes, model.TORCH, abstract(name, getattr(load_config(config), name)))
        try:
            placements(tensors.shapes, model.TORCH, wanted, unused=model.UNUSED)
        except Mismatch as found:
            return found if len(found.wrong) < many else Mismatch(found.missing, found.left_over, [])
        return Mismatch([], [], [])

    def size(problem: Mismatch) -> tuple[int, int]:
        return len(problem.missing) + len(problem.left_over), len(problem.wrong)

    nearest = min(map(compare, PUBLISHED), key=size)
    says_more = not isinstance(error, Mismatch) or size(nearest) < size(error)
    return nearest if any(size(nearest)) and says_more else error


def _convert_network(name: str, network: Network, folder: Path, status) -> None:
    model = COMPONENTS[name].model

    def report(_, done: int, total: int) -> None:
        status.update(f"converting {name}: {100 * done // total} %")

    convert_component(
        network.tensors, model.TORCH, network.wanted, network.config, folder,
        unused=model.UNUSED, source=network.path.name, report=report,
    )  # fmt: skip


def _note_source(manifest: Path, name: str, path: str) -> None:
    """Add to DST/kavatar.json which file of SRC a part was made from."""
    noted = _read_json(manifest).get("sources", {}) if manifest.is_file() else {}
    text = json.dumps({"layout": "kavatar", "sources": noted | {name: path}}, indent=2)
    partial = manifest.with_name(f".{manifest.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(manifest)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, perhaps a pointer to the file or a part of it: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where an object was expected")
    return value


if __name__ == "__main__":
    sys.exit(main())
