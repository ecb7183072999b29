"""Sliding windows denoised as a wave rather than in lock-step: the same numbers, before the last window is there.

Window k at a noise level reads what the windows k - r .. k + r were at the level before, r being how many neighbours a
window reaches on either side. So it may go on once its r right neighbours have been through the level, and no later window
matters. The wave moves `group` windows at a time; here r is 1, the group 2, and there are 3 levels (the sixth round):

    window        0   1   2   3   4   5   6   7   8   9  10  11  12 ...
    level 0                                          (9)[10  11]          speech of 10 and 11 has just been heard
    level 1                                      (8)[ 9  10]
    level 2                                  (7)[ 8   9]
    done          .   .   .   .   .   .   7   8                           leave the wave, 0 .. 6 have left

A round goes down the levels. At each the model is called on the windows in brackets; with their velocities those from the
window in parentheses, which waited for its right neighbour, to the last but one can be fused and moved, and these are just
the windows that the next level takes up. So every call is full and at one noise level, there are no more calls than in
lock-step but for one per level at the end, and a window is done when the speech of `levels * r` later ones has been heard.
No exact schedule needs less: the last velocity reads a neighbour, whose last but one reads its neighbour, and so on.

What a level keeps from round to round: its r waiting windows, and the velocities of these and of the r before, which they
are fused with.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.diffusion.solver import History, Move, advance
from kavatar_jax.diffusion.windows import Windows, fuse, fusion_weights


class Level(NamedTuple):
    """What stays at a noise level between rounds. waiting: of r windows; velocity: (2 r, T, ...), these last."""

    waiting: History
    velocity: Any


@dataclass(frozen=True)
class Wave:
    """Windows of `length` latent frames, `stride` apart, that move through `levels` noise levels `group` at a time.

    front: the first window of a round at level 0.
    """

    length: int
    stride: int
    group: int
    levels: int

    @property
    def reach(self) -> int:
        """How many neighbours on either side a window overlaps with."""
        return (self.length - 1) // self.stride

    def first(self, front: int, level: int) -> int:
        """The first window of a round at a level; at level `levels` it is the first that is done."""
        return front - level * self.reach

    def weights(self, first: int, count: int, ramp: np.ndarray | None) -> np.ndarray:
        """How the windows first - 2 r .. first + group - 1 are fused: (2 r + group, length).

        Windows below 0 and from `count` on weigh nothing. That there will be more than `count` makes no difference to the
        windows that move: they do not reach beyond those called.
        """
        weights = np.zeros((2 * self.reach + self.group, self.length), np.float32)
        start = first - 2 * self.reach
        real = range(max(start, 0), min(first + self.group, count))
        if real:
            chain = Windows((len(real) - 1) * self.stride + self.length, self.length, self.stride, len(real))
            weights[real.start - start : real.stop - start] = fusion_weights(chain, ramp)
        return weights


def begin_level(block: History, wave: Wave) -> Level:
    """A level to which no window has come yet; `block` is a round's windows."""

    def zeros(count):
        return lambda leaf: jnp.zeros((count, *leaf.shape[1:]), leaf.dtype)

    return Level(jax.tree.map(zeros(wave.reach), block), zeros(2 * wave.reach)(block.x))


def pass_level(level: Level, block: History, velocity, weights, move: Move, wave: Wave) -> tuple[Level, History]:
    """A round at one level: its windows come in with their velocities, and `group` windows go on to the next level.

    block: windows first .. first + group - 1; velocity: theirs, before it is fused; weights: of `Wave.weights`.
    Those that go on are r places to the left.
    """
    velocity = jnp.concatenate([level.velocity, velocity])
    waiting, going = move_on(level.waiting, block, wave)
    fused = fuse(velocity, weights, wave.stride)[wave.reach : wave.reach + wave.group]
    return Level(waiting, velocity[wave.group :]), advance(going, fused, move)


def move_on(waiting, block, wave: Wave):
    """What is known of the r windows that waited at a level and of a round's -> of those that wait now, and of the `group`
    windows that go on."""
    windows = jax.tree.map(lambda *parts: jnp.concatenate(parts), waiting, block)
    return jax.tree.map(lambda leaf: leaf[wave.group :], windows), jax.tree.map(
        lambda leaf: leaf[: wave.group], windows
    )
