"""Whether an autoencoder keeps what has to be heard: python tools/gate.py WEIGHTS [--clips 16] [--sheet FILE.png]

Held-out puppets go through WEIGHTS/vae and back, and the mouth's opening is read from the pixels and held against the truth.
A transformer can learn no better lips than its autoencoder lets through, so train none before this passes. Exit 1 if the
correlation over all frames is under --least.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from kavatar_jax.checkpoint.weights import load_component, read_config
from kavatar_jax.config import VAEConfig
from kavatar_jax.media.video import contact_sheet
from kavatar_jax.models.components import abstract
from kavatar_jax.puppets import judge
from kavatar_jax.puppets.measure import read
from kavatar_jax.puppets.records import Records, RecordsConfig
from kavatar_jax.puppets.state import column
from kavatar_jax.training.reconstruction import reconstruct
from kavatar_jax.types import Params

STILLS = 7  # of each clip, on the sheet


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=33, help="of a clip; 4n+1")
    parser.add_argument(
        "--size", type=int, default=128, help="width and height of a clip, as the autoencoder was trained"
    )
    parser.add_argument("--least", type=float, default=0.95, help="correlation over all frames that passes")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="the clips, and below each what came back")
    arguments = parser.parse_args(words)
    try:
        check_frames(arguments.frames)
        found = measure(
            open_autoencoder(arguments.weights), arguments.clips, arguments.frames, arguments.sheet, size=arguments.size
        )
    except ValueError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    table = Table("clips", "opening, all frames", "median of clips", "worst clip", "PSNR dB", "goal", "passed")
    passed = found["pooled"] >= arguments.least
    row = [f"{found[name]:.3f}" for name in ("pooled", "median", "worst")]
    table.add_row(str(arguments.clips), *row, f"{found['psnr']:.1f}", f"{arguments.least:g}", "yes" if passed else "no")
    Console(width=120).print(table)
    return 0 if passed else 1


def check_frames(frames: int) -> None:
    """ValueError unless so many frames are whole latents, and more than one of them."""
    if frames < 5 or frames % 4 != 1:
        raise ValueError(f"--frames is {frames}; it must be 4n+1, and at least 5")


def read_autoencoder(folder: Path) -> tuple[Params, VAEConfig]:
    config = read_config(folder / "vae", VAEConfig)
    wanted = abstract("vae", config)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return load_component(folder / "vae", wanted, jax.tree.map(lambda _: place, wanted)), config


def open_autoencoder(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function of one clip, (F, H, W, 3) uint8, that gives what comes back of it."""
    params, config = read_autoencoder(folder)
    there_and_back = jax.jit(lambda video: reconstruct(params, video, config))
    return lambda video: np.asarray(there_and_back(video[None])[0])


def measure(
    autoencoder: Callable, clips: int, frames: int, sheet: Path | None = None, *, size: int = 128
) -> dict[str, float]:
    """Correlations of the opening over all frames, the median and the worst of clips in which the mouth moves, and PSNR."""
    records = Records(RecordsConfig(split="held out", frames=frames, width=size, height=size))
    pairs, errors, stills = [], [], []
    for number in range(clips):
        record = records[number]
        made = autoencoder(record["video"])
        pairs.append((read(made, record["portrait"]).mouth_open, column(record["state"], "mouth_open")))
        errors.append(np.mean(np.square(made.astype(np.float32) - record["video"])))
        chosen = np.linspace(0, frames - 1, STILLS).astype(int)
        stills += [*record["video"][chosen], *made[chosen]]
    if sheet is not None:
        Image.fromarray(contact_sheet(stills, columns=STILLS)).save(sheet)
    own = [value for value in (judge.correlate(*pair) for pair in pairs) if np.isfinite(value)]
    if not own:
        raise ValueError(f"in {clips} clips of {frames} frames no mouth moves; give more --clips or --frames")
    return {
        "pooled": judge.judge_sync(pairs).pooled,
        "median": float(np.median(own)),
        "worst": min(own),
        "psnr": float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-9)))),
    }


if __name__ == "__main__":
    sys.exit(main())
