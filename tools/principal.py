"""The best linear autoencoder of a run's clips, to begin training from: python tools/principal.py CONFIG OUT --clips 160

CONFIG names a run of the task "vae" whose model.vae.bypass is set. Writes OUT/vae; go on with
kavatar train --config CONFIG --set weights=OUT --out RUN
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from kavatar_jax.checkpoint.weights import save_component
from kavatar_jax.console import Display
from kavatar_jax.training.config import load_training
from kavatar_jax.training.data import Records
from kavatar_jax.training.principal import principal_autoencoder


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=160, help="of the run's longest whole bucket")
    parser.add_argument(
        "--lip-weight", type=float, default=30.0, help="of the pixels of a latent, where there are lips"
    )
    parser.add_argument("--set", dest="fields", action="append", default=[], help="replace a field: data.seed=1")
    arguments = parser.parse_args(words)
    try:
        config = load_training(arguments.config, arguments.fields)
        if config.task != "vae":
            raise ValueError(f"{arguments.config} does not train an autoencoder; configs/demo_vae.py does")
        if arguments.clips < 1:
            raise ValueError(f"--clips is {arguments.clips}; it must be at least 1")
        bucket = max(config.data.buckets, key=lambda bucket: (bucket.closeup == 1, bucket.frames))
        records = Records(dataclasses.replace(config.data, buckets=(bucket,)), bucket, config.model)

        def clips():
            for serial in range(arguments.clips):
                yield records.take(serial, np.random.default_rng([config.data.seed, serial]))
                display("reading clips", serial + 1, arguments.clips)

        with Display(Console(stderr=True)) as display:
            params = principal_autoencoder(clips(), config.model.vae, lip_weight=arguments.lip_weight, seed=config.seed)
        save_component(params, config.model.vae, arguments.out / "vae")
    except ValueError as error:
        print(f"principal: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
