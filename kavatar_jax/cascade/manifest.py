"""The lines of a manifest as jobs, and the ledger of what became of them.

A manifest is a file of JSON lines, one video each: `name`, `portrait` and `speech`, and where wanted `instruction`, `seed`,
`storyline` and `mode`; paths are relative to the manifest. The ledger, `results.jsonl` beside the videos, gets one line for
every video that is done and for every one that could not be made.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from kavatar_jax.cascade.command import SPOKEN, Order
from kavatar_jax.config import Config

NEEDED, WANTED = ("name", "portrait", "speech"), ("instruction", "seed", "storyline", "mode")
LEDGER = "results.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One line of a manifest. told: as it is written; order: as if it had been typed for `kavatar generate`."""

    line: int
    name: str
    told: dict
    order: Order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A line of a manifest that cannot be made, and why."""

    line: int
    error: str


def read_manifest(path: Path, template: Order) -> tuple[list[Job], list[Fault]]:
    """Every line as a job or a fault; empty lines are passed over.

    template: what jobs have in common; its `out` is the folder of the videos
    ValueError if there is no such file, or nothing in it.
    """
    if not path.is_file():
        raise ValueError(f"manifest {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    jobs: dict[str, Job] = {}
    faults = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            job = _read_line(line, number, path.parent, template)
            if job.name in jobs:
                raise ValueError(f"name {job.name!r} is taken by line {jobs[job.name].line}; every video needs its own")
            jobs[job.name] = job
        except ValueError as error:
            faults.append(Fault(line=number, error=f"{path.name} line {number}: {error}"))
    if not jobs and not faults:
        raise ValueError(f"manifest {path}: is empty; give one line of JSON for every video")
    return list(jobs.values()), faults


def fingerprint(job: Job, config: Config) -> str:
    """Of what a video depends on, but for what is in the files: a job whose line or settings change is made anew."""
    weights = job.order.weights and str(job.order.weights.resolve())
    settings = [job.told, job.order.mode, weights, dataclasses.asdict(config)]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Ledger:
    """results.jsonl in a folder. A line is appended by one write, so that several processes can share the file."""

    def __init__(self, folder: Path):
        self.path = folder / LEDGER

    def done(self) -> dict[str, str]:
        """Name to fingerprint of every video that a line calls done."""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        found = {}
        for line in lines:
            try:
                told = json.loads(line)
            except ValueError:  # a line that a full disk or a loss of power cut short
                continue
            if told["status"] == "done":
                found[told["name"]] = told["fingerprint"]
        return found

    def add(self, **told) -> None:
        line = json.dumps(told, ensure_ascii=False) + "\n"
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            torn = size and os.pread(file, 1, size - 1) != b"\n"
            os.write(file, (("\n" if torn else "") + line).encode())
        finally:
            os.close(file)


def _read_line(line: bytes, number: int, folder: Path, template: Order) -> Job:
    """ValueError that says what is wrong with it."""
    try:
        told = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(told, dict):
        raise ValueError('is not a JSON object, as in {"name": "anna", "portrait": "anna.png", "speech": "anna.wav"}')
    _check_keys(told)
    name, mode = told["name"], told.get("mode", template.mode)
    if name != Path(name).name or name.startswith("."):
        raise ValueError(f"name {name!r} cannot be that of a file; leave out slashes and leading dots")
    if mode not in SPOKEN:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(SPOKEN)}")
    paths = {key: folder / told[key] for key in ("portrait", "speech", "storyline") if key in told}
    for key, path in paths.items():
        if not path.is_file():
            raise ValueError(f"{key} {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    rest = {key: told[key] for key in ("instruction", "seed") if key in told}
    order = dataclasses.replace(template, out=template.out / f"{name}.mp4", mode=mode, **paths, **rest)
    return Job(line=number, name=name, told=told, order=order)


def _check_keys(told: dict) -> None:
    known = (*NEEDED, *WANTED)
    for key, value in told.items():
        if key not in known:
            raise ValueError(f"key {key!r} is not one of {', '.join(known)}")
        kind = int if key == "seed" else str
        if type(value) is not kind:
            raise ValueError(f"{key} {value!r} is not {'a whole number' if kind is int else 'text'}")
    missing = [key for key in NEEDED if not told.get(key)]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
