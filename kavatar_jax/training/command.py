"""What `kavatar train` does: read the config, train, say where things are."""

import dataclasses
import json
from pathlib import Path

import jax
from rich.console import Console

from kavatar_jax.console import keep_compiled_programs
from kavatar_jax.training.config import load_training
from kavatar_jax.training.loop import train


def run(*, config: str, out: Path, resume: bool = False, fields: tuple[str, ...] = ()) -> None:
    """Train as the config says. ValueError, before any work where possible, for whatever the user can mend.

    config: a name in configs/, NAME:VARIANT, or a file; out: where everything goes; resume: go on from the newest
    checkpoint there, if there is one; fields: "optimizer.learning_rate=1e-4", ...
    """
    wanted = load_training(config, list(fields))
    keep_compiled_programs()
    out.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(wanted), indent=2) + "\n")
    done = train(wanted, out, resume=resume)
    if done == wanted.steps and jax.process_index() == 0:
        Console(stderr=True).print(
            f"{done} steps done; the weights are in {out / 'weights'}", highlight=False, soft_wrap=True
        )
