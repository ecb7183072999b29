"""Send every portrait and every recording of a folder through `kavatar generate`: python tools/sweep.py DATA OUT

DATA has `images/` and `audio/`. Each recording gets a portrait, each portrait a recording (the shortest ones, once the
recordings have all had their turn), alternating between cascade and single mode. Prints a table of what came out; exit 1
if anything failed or a video is not as long as its speech.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from kavatar_jax.__main__ import app
from kavatar_jax.cascade.command import MODES
from kavatar_jax.media.audio import load_speech
from kavatar_jax.media.video import probe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--steps", default="2", help="denoising steps; few, since nothing is looked at")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="leave out recordings longer than this")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [
        try_pair(portrait, speech, mode, arguments)
        for (portrait, speech), mode in zip(pairs(arguments.data, arguments.seconds), itertools.cycle(MODES))
    ]
    table = Table("portrait", "speech", "mode", "speech s", "frames", "sound", "took s", "result")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    good = sum(row[-1] == "ok" for row in rows)
    print(f"{good} of {len(rows)} ok")
    return 0 if good == len(rows) else 1


def pairs(data: Path, longest: float) -> list[tuple[Path, Path]]:
    images, audio = (sorted(p for p in (data / kind).iterdir() if p.is_file()) for kind in ("images", "audio"))
    seconds = {path: load_speech(path).seconds for path in audio}
    audio = sorted((path for path in audio if seconds[path] <= longest), key=lambda path: -seconds[path])
    again = itertools.cycle(audio[-3:])
    return [(image, next(again) if i >= len(audio) else audio[i]) for i, image in enumerate(images)] + [
        (images[i % len(images)], audio[i]) for i in range(len(images), len(audio))
    ]


def try_pair(portrait: Path, speech: Path, mode: str, arguments) -> tuple[str, ...]:
    out = arguments.out / f"{portrait.stem}.mp4"
    words = ["--portrait", portrait, "--speech", speech, "--out", out, "--mode", mode]
    words += ["--config", arguments.config, "--steps", arguments.steps]
    started = time.perf_counter()
    result = CliRunner().invoke(app, ["generate", *map(str, words)])
    took, seconds = time.perf_counter() - started, load_speech(speech).seconds
    head = portrait.name, speech.name, mode, f"{seconds:.1f}"
    if result.exit_code:
        said = (result.output.strip().splitlines() or [repr(result.exception)])[-1]
        return *head, "-", "-", f"{took:.0f}", said
    info = probe(out)
    fine = abs(info.frames - round(seconds * info.fps)) <= 1 and info.has_audio
    print(f"{portrait.name} {speech.name} {mode}: {info.frames} frames in {took:.0f} s", file=sys.stderr, flush=True)
    return *head, str(info.frames), str(info.has_audio), f"{took:.0f}", "ok" if fine else "wrong length or no sound"


if __name__ == "__main__":
    sys.exit(main())
