"""Compare our models with recorded reference outputs: python tools/parity.py FIXTURE... [--markdown]

Synthesises each fixture's weights, converts them through the model's TORCH table, runs the model and prints the largest
relative error of every output against its tolerance. Exit 1 if any is over, if an output is missing, or if a fixture's
component is not built yet.
"""

import argparse
import os
import resource
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from tools.reference import clip, dit, e2e, loss, sampler, solvers, tables, umt5, vae, wav2vec2
from tools.reference.synthetic_weights import Fixture

COMPONENTS = (dit, vae, umt5, clip, wav2vec2, tables, sampler, solvers, e2e, loss)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fixtures", nargs="+", type=Path, help="folders with meta.json and outputs.npz")
    parser.add_argument("--markdown", action="store_true", help="print one line per fixture as a table for the README")
    arguments = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    results = [check(folder, quiet=arguments.markdown) for folder in arguments.fixtures if _is_fixture(folder)]
    if arguments.markdown:
        print("| fixture | outputs | largest error / tolerance | result |\n|---|---|---|---|")
        for name, count, worst, good in results:
            print(f"| `{name}` | {count} | {worst} | {'pass' if good else 'FAIL'} |")
    failed = [name for name, *_, good in results if not good]
    print(
        f"{len(results) - len(failed)} of {len(results)} fixtures pass"
        + (f"; not: {', '.join(failed)}" if failed else "")
    )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    return 1 if failed or not results else 0


def check(folder: Path, *, quiet: bool) -> tuple[str, int, str, bool]:
    """(name, outputs, worst error and its tolerance, whether all is well) of one fixture."""
    fixture = Fixture(str(folder))
    name = fixture.meta["fixture"]
    component = next((c for c in COMPONENTS if name.startswith(c.FIXTURES)), None)
    if component is None:
        print(f"{name}: not built yet")
        return name, 0, "-", False
    worst, good, seen = (-1.0, "-"), True, set()
    for output, value in component.run(fixture):
        error, tolerance = max(fixture.compare(output, value).values()), _tolerance(fixture, output)
        fine = error <= tolerance  # also false where the error is not a number
        good, seen = good and fine, seen | {output}
        ratio = error / tolerance if tolerance else float(error > 0)
        worst = max(worst, (ratio, f"{error:.1e} / {tolerance:g}"))
        if not quiet:
            print(
                f"{name:18} {output:36} {error:9.2e}  tolerance {tolerance:7.0e}  {'ok' if fine else 'OVER'}",
                flush=True,
            )
    for output in sorted(set(fixture.meta["outputs"]) - seen):
        good = False
        print(f"{name:18} {output:36} not produced")
    return name, len(seen), worst[1], good


def _tolerance(fixture: Fixture, output: str) -> float:
    tolerance = fixture.meta["tolerance"]
    return tolerance.get(output, tolerance["default"]) if isinstance(tolerance, dict) else tolerance


def _is_fixture(folder: Path) -> bool:
    if folder.is_dir() and not (folder / "meta.json").is_file():
        print(f"{folder} is no fixture (no meta.json), left out", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
