"""Which latent channels tell of mouths: python tools/mouths.py WEIGHTS [--clips 48]

Held-out puppets are drawn twice, as they speak and with their mouths held at their mean, and both go through WEIGHTS/vae.
Prints for each channel what the mouth's part is of its change since the first frame, in latents with lips in them, as
objective.lip_channels of a training run may want it.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs.demo import DRIVEN
from kavatar_jax.config import VAEConfig
from kavatar_jax.models import vae
from kavatar_jax.puppets.records import Records, RecordsConfig
from kavatar_jax.puppets.stage import render
from kavatar_jax.puppets.state import MOUTH, column
from kavatar_jax.training.objective import resize_masks
from kavatar_jax.types import Params
from tools.gate import check_frames, read_autoencoder


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--frames", type=int, default=33, help="of a clip; 4n+1")
    parser.add_argument("--size", type=int, default=128, help="width and height of a clip")
    arguments = parser.parse_args(words)
    try:
        if arguments.clips < 1:
            raise ValueError(f"--clips is {arguments.clips}; it must be at least 1")
        check_frames(arguments.frames)
        shares = mouth_shares(
            *read_autoencoder(arguments.weights), clips=arguments.clips, frames=arguments.frames, size=arguments.size
        )
    except ValueError as error:
        print(f"mouths: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{share:.2f}" for share in shares))
    return 0


def mouth_shares(params: Params, config: VAEConfig, *, clips: int, frames: int, size: int) -> np.ndarray:
    """(C,): mean square of what a moving mouth changes, over that of all change since a clip's first frame."""

    @jax.jit
    def encode(videos):
        return vae.encode(params, videos.astype(jnp.float32) / 127.5 - 1, config)[0]

    records = Records(RecordsConfig(split="held out", frames=frames, width=size, height=size, driven=DRIVEN, seed=3))
    mouth, change = np.zeros((2, config.latent_channels))
    for number in range(clips):
        identity, _, _, state, _ = records.perform(number)
        still = state.copy()
        for name in MOUTH:
            column(still, name)[:] = column(state, name).mean()
        footage = render(identity, state, height=size, width=size)
        other = render(identity, still, height=size, width=size)
        moving, held = np.asarray(encode(np.stack([footage.video, other.video])))
        lips = resize_masks(footage.lip_mask[None], moving.shape[:3], "grouped")[0]
        cells = np.asarray(lips) > 0
        mouth += np.square(moving - held)[cells].sum(axis=0)
        change += np.square(moving - moving[:1])[cells].sum(axis=0)
    return mouth / change


if __name__ == "__main__":
    sys.exit(main())
