"""From our weights directory to the layouts of others; the command is tools/convert_checkpoint.py."""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from kavatar_jax.checkpoint.bridge import Mismatch, Row
from kavatar_jax.checkpoint.files import Tensors, read_json
from kavatar_jax.checkpoint.manifest import note
from kavatar_jax.checkpoint.shards import Lazy, open_tensors, write_tensors
from kavatar_jax.checkpoint.weights import as_reference, open_component, read_config, replacing
from kavatar_jax.models.components import COMPONENTS, abstract, model_of
from tools.layouts import PARTS, TRANSFORMERS, Place, detect, places
from tools.pipeline import complete_pipeline

LAYOUTS = ("diffusers", "wan", "stableavatar", "transformers")


class Ready(NamedTuple):
    """A network ready to be written. described: its config.json, None where the layout has none."""

    place: Place
    tensors: dict[str, Lazy]
    described: dict | None


def export(
    source: Path, destination: Path, layout: str, *,
    transformer: str = "square", only: list[str] | None = None, shard_size: int, rest: Path | None = None,
) -> None:  # fmt: skip
    """Write every part of our weights directory that the layout has, or those in `only`, into a new folder.

    transformer: which of the release's it is to be called
    shard_size: bytes of a safetensors file from which on it is cut
    rest: a folder in this layout, for the tensors of its files that our networks have no use for
    ValueError says all that is missing or does not fit, one line for each part, before anything is written.
    """
    console = Console(stderr=True)
    found, reason, _ = detect(source)
    console.print(f"{found}: {reason}", soft_wrap=True)
    if found != "kavatar":
        raise ValueError(f"{source} is a {found} folder; make a weights directory of ours of it first: --to kavatar")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"there is something at {destination}; name a folder that is new")
    if layout == "stableavatar" and transformer not in TRANSFORMERS:
        raise ValueError(f"--transformer {transformer} is not {' or '.join(TRANSFORMERS)}")
    if shard_size < 1:
        raise ValueError(f"--shard-size of {shard_size} bytes: it must be above 0")
    destination, known = destination.absolute(), places(layout, transformer)
    ready, problems = {}, []
    for name in _parts(source, layout, known, only):
        try:
            ready[name] = _prepare(name, source / name, known[name], rest)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    with replacing(destination) as partial:
        for name, part in ready.items():
            _write(name, part, source / name, partial, shard_size, rest, console)
        if layout == "diffusers" and "dit" in ready:
            complete_pipeline(partial, read_config(source / "dit", *COMPONENTS["dit"].kinds))
        files = [file for file in partial.rglob("*") if file.is_file()]
        note(partial, layout, {name: name for name in ready}, files)


def _parts(source: Path, layout: str, known: dict[str, Place], only: list[str] | None) -> list[str]:
    """Parts to write: all that are there, but that which no such layout has any place for."""
    there = {name for name in PARTS if (source / name).is_dir()}
    if only:
        lacking = [f"{name} ({source / name})" for name in only if name not in there]
        if lacking:
            raise ValueError(f"{source} has not all of --only; missing: {', '.join(lacking)}")
        strange = [name for name in only if name not in known]
        if strange:
            raise ValueError(f"{layout} has no {', '.join(strange)}; it has {', '.join(known)}")
    return [name for name in known if name in there and (not only or name in only)]


def _prepare(name: str, folder: Path, place: Place, rest: Path | None) -> Ready:
    """Open a component and name its tensors as the layout does; ValueError if it is not what its config.json says."""
    if place.names is None:
        return Ready(place, {}, None)
    config = read_config(folder, *COMPONENTS[name].kinds)
    fitting = (names for names in (place.names, *place.kinds) if names.model is model_of(name, config))
    place = place._replace(names=next(fitting, None))
    if place.names is None:
        raise ValueError(
            f"it is a {type(config).__name__}, for which this layout has no place; leave it out with --only"
        )
    described = place.names.describe(config) if place.names.describe is not None else None
    tensors = open_component(folder, abstract(name, config))
    if not place.more:
        reference = as_reference(folder, tensors, place.names.rows)
        dtypes = {str(tensor.dtype) for tensor in reference.values()}
        if described is not None and "architectures" in described and len(dtypes) == 1:
            described["torch_dtype"] = dtypes.pop()  # transformers makes its model in it
        return Ready(place, reference, described if place.config else None)
    if rest is None:
        raise ValueError(
            f"{place.path} of the release has more tensors than ours keeps ({', '.join(place.names.unused)}); name a "
            f"folder of the release with --rest, or leave the part out with --only"
        )
    path = place.locate(rest)
    theirs = open_tensors(path)
    if place.config:
        place.names.compare(read_json(rest / place.config), config)
    reference = as_reference(folder, tensors, _spelt(place.names.rows, theirs))
    return Ready(place, reference | _beside(path, theirs, reference, place.names.unused), None)


def _spelt(rows: list[Row], theirs: Tensors) -> list[Row]:
    """Rows with the spellings of another file."""

    def choose(spellings: list[str]) -> str:
        return next((key for key in spellings if key.replace("{}", "0") in theirs), spellings[0])

    return [row._replace(key=choose(row.key.split("|"))) for row in rows]


def _beside(path: Path, theirs: Tensors, ours: dict[str, Lazy], unused: tuple[str, ...]) -> dict[str, Lazy]:
    """The tensors of the release's file that are not ours; ValueError if it is not the file of such a network."""
    missing = sorted(ours.keys() - theirs.keys())
    left = sorted(key for key in theirs.keys() - ours.keys() if not any(re.fullmatch(one, key) for one in unused))
    wrong = [f"{key} is {theirs.shapes[key]}, expected {tensor.shape}" for key, tensor in ours.items()
             if key in theirs and theirs.shapes[key] != tensor.shape]  # fmt: skip
    if missing or left or wrong:
        raise ValueError(f"{path} of --rest is of another network: {Mismatch(missing, left, wrong)}")

    def lazy(key: str) -> Lazy:
        return Lazy(theirs.shapes[key], theirs.dtypes[key], lambda: theirs[key])

    return {key: lazy(key) for key in theirs.keys() - ours.keys()}


def _write(
    name: str, part: Ready, source: Path, folder: Path, shard_size: int, rest: Path | None, console: Console
) -> None:
    path = folder / part.place.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.place.names is None:
        shutil.copytree(source, path.parent, dirs_exist_ok=True)
    else:
        with console.status(f"writing {name}") as status:

            def report(_, done: int, total: int) -> None:
                status.update(f"writing {name}: {100 * done // total} %")

            broken = write_tensors(path, part.tensors, shard_size=shard_size, report=report)
        if part.described is not None and part.place.config:
            config = folder / part.place.config
            config.parent.mkdir(parents=True, exist_ok=True)
            config.write_text(json.dumps(part.described, indent=2) + "\n", encoding="utf-8")
        elif part.place.config and rest is not None:  # what the release has beside the weights: of a recogniser
            for file in (rest / part.place.config).parent.glob("*.json"):
                shutil.copyfile(file, path.parent / file.name)
        if broken:
            console.print(f"[red]{name:10} has NaN or Inf in {', '.join(sorted(broken))}", soft_wrap=True)
    console.print(f"{name:10} to {part.place.path}", soft_wrap=True)
