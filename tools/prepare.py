"""Compute latents and features of a run's clips once: python tools/prepare.py CONFIG OUT --count 4096

CONFIG names a training run in configs/, as for `kavatar train`, whose data comes from puppets or clip folders. Afterwards
train with --set data.source=prepared --set data.folder=OUT. Where the run's encoders started from chance they are in
OUT/weights; give them with --set weights=OUT/weights and name in `fresh` what is to start anew, as in
--set "fresh=('(dit|text)/.*',)". What is there already is kept, so a call that was cut short can be repeated.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from kavatar_jax.console import Display
from kavatar_jax.training.config import load_training
from kavatar_jax.training.prepare import prepare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, required=True, help="clips of every bucket; a multiple of its batch")
    parser.add_argument("--set", dest="fields", action="append", default=[], help="replace a field: data.seed=1")
    arguments = parser.parse_args()
    try:
        config = load_training(arguments.config, arguments.fields)
        with Display(Console(stderr=True)) as display:
            prepare(config, arguments.out, count=arguments.count, report=display)
    except ValueError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
