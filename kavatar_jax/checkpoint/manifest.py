"""kavatar.json of a checkpoint folder: its layout, what each part was made from, and a hash of every file."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from kavatar_jax.checkpoint.files import read_json

NAME = "kavatar.json"


def note(folder: Path, layout: str, sources: dict[str, str], files: Iterable[Path]) -> None:
    """Add parts of a folder to its manifest. sources: part -> the file it was made from; files: those to be hashed."""
    path = folder / NAME
    noted = read_json(path) if path.is_file() else {}
    hashes = {name: value for name, value in noted.get("sha256", {}).items() if (folder / name).is_file()}
    hashes |= {file.relative_to(folder).as_posix(): digest(file) for file in sorted(files)}
    described = {"layout": layout, "sources": noted.get("sources", {}) | sources, "sha256": hashes}
    partial = path.with_name(f".{NAME}.partial")
    partial.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def verify(folder: Path) -> list[str]:
    """What is not as the manifest says, a line each; nothing if every file is there and unchanged. ValueError if there
    is no manifest with hashes.
    """
    hashes = read_json(folder / NAME).get("sha256")
    if not isinstance(hashes, dict) or not hashes:
        raise ValueError(f"{folder / NAME} has no hashes; convert again")
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {NAME}
    problems = [f"{name} is missing" for name in sorted(hashes.keys() - found)]
    problems += [f"{name} is not in {NAME}" for name in sorted(found - hashes.keys())]
    changed = (name for name in sorted(found & hashes.keys()) if digest(folder / name) != hashes[name])
    return problems + [f"{name} has changed" for name in changed]


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
