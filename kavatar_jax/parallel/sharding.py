"""From logical axes to mesh axes. RULES is the only place in the package that names mesh axes.

Model files say what an axis means (`AXES`: parameter path -> logical axes); here is where it lives.
"""

import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from kavatar_jax.types import Params

RULES = {
    None: None,
    "batch": ("data", "fsdp"),
    "tokens": "context",
    "rows": ("data", "fsdp"),
    "columns": ("context", "tensor"),
    "positions": ("data", "fsdp", "context", "tensor"),
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocabulary": "tensor",
    "waiting": ("data", "fsdp", "context", "tensor"),
}


def spec(*logical: str | None) -> P:
    """The PartitionSpec of an array whose axes have these logical names."""
    return P(*(RULES[name] for name in logical))


def parts(logical: str | None, mesh) -> int:
    """Into how many parts the mesh cuts a logical axis."""
    return _count(RULES[logical], mesh)


def mesh_axis(logical: str) -> str:
    """The one mesh axis that a logical axis is spread over, for what is written by hand."""
    axis = RULES[logical]
    assert isinstance(axis, str), f"{logical} is spread over {axis}"
    return axis


def constrain(x, *logical: str | None, padded: bool = False):
    """Pin an activation's layout; without a mesh, or where an axis does not divide, leave that to the compiler.

    padded: have it fill up the last parts of what does not divide; a program cannot return arrays that lie so.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    wanted = spec(*logical)
    return jax.lax.with_sharding_constraint(x, wanted if padded else _divisible(wanted, x.shape, mesh))


def filled(x, *logical: str | None):
    """`constrain`, with zeros at the end of what does not divide: a program returns no parts of unequal size."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    missing = [-size % parts(name, mesh) for size, name in zip(x.shape, logical, strict=True)]
    return constrain(jnp.pad(x, [(0, count) for count in missing]) if any(missing) else x, *logical)


def gathered(kernel):
    """A kernel whose rows or columns lie apart, whole where it is used; one whose heads do too is left to the compiler.

    Left to a TPU's compiler, gather and product become a loop that multiplies a part of the kernel in each round, and each
    round reads and writes the float32 sums of all tokens: several times the traffic with memory.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[RULES["embed"]] == 1 or mesh.shape[RULES["heads"]] > 1:
        return kernel
    return jax.lax.with_sharding_constraint(kernel, P())


def at_hand(weight, *, whole: bool = True):
    """A weight that waits in the host's memory (`partition`), on the devices; any other as it is.

    whole: on each of them; else each has a part of its last axis
    """
    if jax.typeof(weight).memory_space != jax.memory.Space.Host:
        return weight
    # without the barrier a TPU's compiler gathers it in the hosts' memory, over their network
    weight = jax.lax.optimization_barrier(jax.device_put(weight, jax.memory.Space.Device))
    return jax.lax.with_sharding_constraint(weight, P()) if whole else weight


def place_of(shape: tuple[int, ...], logical: tuple[str | None, ...], mesh) -> NamedSharding:
    """Where an array of this shape and these logical axes lies. An axis that the mesh does not divide is replicated."""
    return NamedSharding(mesh, _divisible(spec(*logical), shape, mesh))


def partition(params: Params, axes: dict[str, tuple], mesh, *, on_host: bool = False) -> Params:
    """A NamedSharding for every leaf of `params` from a model's AXES (regular expression -> logical axes).

    Every leaf must match exactly one row. on_host: kernels of stacked layers and tables of words, nearly all of a large
    encoder, wait in the host's memory, in equal parts of which each device brings one (`at_hand`), a layer at a time
    """

    def place(path, leaf):
        name = "/".join(str(key.key) for key in path)
        rows = [row for row in axes if re.fullmatch(row, name)]
        assert len(rows) == 1, f"{name} is matched by {rows or 'no row'} of AXES"
        logical = axes[rows[0]]
        assert len(logical) == len(leaf.shape), f"{name} has shape {leaf.shape} and axes {logical}"
        if on_host and (logical[0] == "vocabulary" or logical[0] == "layers" and name.endswith("kernel")):
            waiting = (*[None] * (len(logical) - 1), "waiting")
            return place_of(leaf.shape, waiting, mesh).with_memory_kind("pinned_host")
        return place_of(leaf.shape, logical, mesh)

    return jax.tree_util.tree_map_with_path(place, params)


def described(tree, places):
    """Arrays, or what stands for them, as shapes, dtypes and places with nothing in them.

    places: a tree of shardings, or one for all of it
    """
    if isinstance(places, Sharding):
        places = jax.tree.map(lambda _: places, tree)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places)


def replicated(mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh) -> NamedSharding:
    """The leading axis spread over data and fsdp."""
    return NamedSharding(mesh, spec("batch"))


def batch_slots(mesh) -> int:
    """How many slots the leading axis of a batch is spread over; one without a mesh."""
    return 1 if mesh.empty else parts("batch", mesh)


def _divisible(wanted: P, shape, mesh) -> P:
    return P(*(axes if size % _count(axes, mesh) == 0 else None for axes, size in zip(wanted, shape, strict=True)))


def _count(axes: str | tuple[str, ...] | None, mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
