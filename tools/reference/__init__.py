"""Recorded reference outputs on synthesised weights, and how each of our components reproduces them.

One module per component: FIXTURES names the fixtures it serves by prefix, run(fixture) yields every output that the
fixture holds, in the fixture's layout. `tools/parity.py` prints the errors; the golden tests assert them.
"""

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from kavatar_jax.checkpoint.bridge import Row, to_kavatar, unflatten
from kavatar_jax.types import Params
from tools.reference.synthetic_weights import Fixture, synthesize_tensor


class Weights(Mapping):
    """A fixture's synthesised state dict; each tensor is made when it is asked for and not kept."""

    def __init__(self, fixture: Fixture, group: str = "params"):
        self.shapes = dict(fixture.shapes(group))
        self._tag = fixture.tag

    def __getitem__(self, key: str) -> np.ndarray:
        return synthesize_tensor(key, self.shapes[key], self._tag)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def load(fixture: Fixture, rows: list[Row], abstract: Params, *, unused=()) -> Params:
    """The fixture's weights as parameters on the device, each host copy let go as soon as it is there."""
    flat = to_kavatar(Weights(fixture), rows, abstract, unused=unused)
    return unflatten({path: jax.device_put(flat.pop(path)) for path in list(flat)})
