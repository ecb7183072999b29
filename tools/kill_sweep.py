"""Kill `kavatar batch` at random moments, go on, and compare with an undisturbed run: every video must be the same file.

python tools/kill_sweep.py manifest.jsonl sweep/ --kills 20 --config demo

Each run gets SIGKILL at a moment drawn from the length of an undisturbed one and the next goes on where it stopped; once all
videos are there, they are compared and it begins anew, until so many kills have struck. Make the videos once before: where
programs have to be compiled, most moments fall into that.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[1]


def main(
    manifest: Annotated[Path, typer.Argument(help="The videos to make.")],
    folder: Annotated[Path, typer.Argument(help="Where they and those of the undisturbed run go.")],
    kills: Annotated[int, typer.Option(help="How many.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    config: Annotated[str, typer.Option(help="As for `kavatar batch`.")] = "demo",
):
    moments, whole, disturbed = random.Random(seed), folder / "undisturbed", folder / "disturbed"
    words = [str(manifest), "--config", config]
    seconds = make(words, whole)
    print(f"undisturbed: {seconds:.1f} s", flush=True)
    struck, killed_since, compared = 0, 0, 0
    while struck < kills or killed_since:
        moment = moments.uniform(0, seconds) if struck < kills else None
        before = len(list(disturbed.glob("[!.]*.mp4")))
        if make(words, disturbed, moment) is None:
            struck, killed_since = struck + 1, killed_since + 1
            hidden = len(list(disturbed.glob(".*")))
            there = len(list(disturbed.glob("[!.]*.mp4")))
            print(f"kill {struck} after {moment:.1f} s: {before} -> {there} videos, {hidden} pieces left", flush=True)
            continue
        files = compare(whole, disturbed)
        print(f"{files} videos are those of the undisturbed run, after {killed_since} kills", flush=True)
        compared, killed_since = compared + 1, 0
        shutil.rmtree(disturbed)
    print(f"{struck} kills, {compared} sets of videos compared: identical")


def make(words: list[str], out: Path, moment: float | None = None) -> float | None:
    """Seconds that the run took, or None if it was killed at `moment`, in seconds from its start."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "kavatar_jax", "batch", *words, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as run:
        try:
            _, said = run.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.communicate()
            return None
    if run.returncode:
        raise SystemExit(f"kavatar batch ended with {run.returncode}: {said[-2000:]}")
    return time.perf_counter() - started


def compare(one: Path, two: Path) -> int:
    """How many videos there are; SystemExit if they differ by a byte or there is anything else beside them."""
    names = sorted(path.name for path in one.iterdir())
    if sorted(path.name for path in two.iterdir()) != names:
        raise SystemExit(f"{one} and {two} do not hold the same files")
    videos = [name for name in names if name.endswith(".mp4")]
    differing = [name for name in videos if (one / name).read_bytes() != (two / name).read_bytes()]
    if differing:
        raise SystemExit(f"not the same in {one} and {two}: {', '.join(differing)}")
    return len(videos)


if __name__ == "__main__":
    typer.run(main)
