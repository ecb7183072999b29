"""From what is ours to a weights directory: LoRA merged into one, or a training run; see tools/convert_checkpoint.py."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kavatar_jax.cascade.weights import read_lora_files
from kavatar_jax.checkpoint.lora import Merged
from kavatar_jax.checkpoint.manifest import note
from kavatar_jax.checkpoint.weights import copy_component, open_component, read_config, replacing
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.training.export import take_tokenizer
from kavatar_jax.training.learnt import open_run
from tools.layouts import PARTS


def merge(
    source: Path, destination: Path, console: Console, *, only: list[str] | None, loras: Sequence[str], unused: str
) -> None:
    """Our weights directory with LoRA files merged into the transformer; its other parts are copied.

    ValueError as lora.read_loras, or if there is no transformer, before anything is written.
    """
    _check_new(destination)
    parts = [name for name in PARTS if (source / name).is_dir() and (not only or name in only)]
    if "dit" not in parts:
        raise ValueError(f"--lora {loras[0]} is for a transformer, and none is taken from {source}")
    config = read_config(source / "dit", *COMPONENTS["dit"].kinds)
    changes = read_lora_files(loras, config, unused=unused)
    tensors = Merged(open_component(source / "dit", abstract("dit", config)), changes)
    made_of = " + ".join(["dit", *loras])
    with replacing(destination) as partial:
        for name in parts:
            if name == "dit":
                _say(console, name, copy_component(tensors, config, partial / name, source=made_of), made_of)
            else:
                shutil.copytree(source / name, partial / name)
        _note(partial, {name: made_of if name == "dit" else name for name in parts})


def take_run(
    source: Path, destination: Path, console: Console, *,
    step: int | None, kind: str, only: list[str] | None, loras: Sequence[str], unused: str,
) -> None:  # fmt: skip
    """The networks of which something learns in a training run, its own LoRA and that of files merged.

    ValueError as learnt.open_run and lora.read_loras, before anything is written.
    """
    _check_new(destination)
    run = open_run(source, step=step, kind=kind)
    parts = [name for name in run.learnt if not only or name in only]
    if not parts or (loras and "dit" not in parts):
        raise ValueError(
            f"{source} trains {', '.join(run.learnt)}; none of it is asked for, or no transformer for --lora"
        )
    changes = {name: run.branches(name) for name in parts}
    networks = {name: Merged(run.network(name), changes[name]) for name in parts}
    if loras:
        networks["dit"] = Merged(networks["dit"], read_lora_files(loras, run.config.model.dit, unused=unused))
    made_of = f"step {run.stored.step}, {run.kind}"
    with replacing(destination) as partial:
        for name, tensors in networks.items():
            config = getattr(run.config.model, name)
            _say(console, name, copy_component(tensors, config, partial / name, source=made_of), made_of)
        if "text" in parts:
            take_tokenizer(partial / "tokenizer", run.config.weights)
        _note(partial, dict.fromkeys(parts, made_of))
    rest = [name for name in COMPONENTS if name not in parts]
    console.print(f"{', '.join(rest)} did not learn there and are not written", soft_wrap=True)


def _check_new(destination: Path) -> None:
    if destination.exists():
        raise ValueError(f"there is something at {destination}; name a folder that is new")


def _note(folder: Path, made_of: dict[str, str]) -> None:
    note(folder, "kavatar", made_of, [file for file in folder.rglob("*") if file.is_file()])


def _say(console: Console, name: str, broken: set[str], made_of: str) -> None:
    console.print(f"{name:10} from {made_of}", soft_wrap=True)
    if broken:
        console.print(f"[red]{name:10} has NaN or Inf in {', '.join(sorted(broken))}", soft_wrap=True)
