"""Between PyTorch names and ours, both ways, one tensor at a time.

A model lists its rows: a reference key, the path of our parameter, and a layout that says how the axes move. Layouts are
two words of axis letters, so they invert themselves: "oi->io" transposes a linear layer, "1nd->nd" drops an axis of one.
In a key `{}` is the layer index, which our parameter stacks on its first axis. In a path `{q,k,v}` names several
parameters that the reference keeps as equal parts of one tensor's first axis. `a|b` as a key gives two spellings of one.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kavatar_jax.types import Params

STRIP = 32  # columns


class Shape(NamedTuple):
    """Stands for an array of which only the shape is known."""

    shape: tuple[int, ...]


class Row(NamedTuple):
    """One line of a model's TORCH table."""

    key: str
    path: str
    layout: str


@dataclass(frozen=True)
class Slot:
    """Where one reference tensor, or one of `parts` equal parts of it, lives in our parameters."""

    path: str
    layout: str
    layer: int | None
    part: int
    parts: int


def linear(key: str, path: str, *, bias: bool = True) -> list[Row]:
    return [Row(f"{key}.weight", f"{path}/kernel", "oi->io")] + [Row(f"{key}.bias", f"{path}/bias", "d->d")] * bias


def norm(key: str, path: str, *, bias: bool = False) -> list[Row]:
    return [Row(f"{key}.weight", f"{path}/scale", "d->d")] + [Row(f"{key}.bias", f"{path}/bias", "d->d")] * bias


def conv(key: str, path: str, *, letters: str, bias: bool = True) -> list[Row]:
    """letters: the kernel's own axes, "thw" for 3D; ours is (*letters, in, out)."""
    rows = [Row(f"{key}.weight", f"{path}/kernel", f"oi{letters}->{letters}io")]
    return rows + [Row(f"{key}.bias", f"{path}/bias", "d->d")] * bias


def table(*groups: list[Row]) -> list[Row]:
    return [row for group in groups for row in group]


def reference_shapes(rows: list[Row], params: Params) -> dict[str, tuple[int, ...]]:
    """Every reference key that these parameters (arrays or shapes) need, and its shape; first spellings."""
    return {spellings[0]: shape for spellings, (_, shape) in _expect(rows, params).items()}


class Shapes(dict):
    """path -> shape; a path that the file has no tensor for means that it is not the file that was asked for."""

    def __missing__(self, path: str):
        raise ValueError(f"the file has no tensor for {path!r}: it does not hold this component's weights")


def parameter_shapes(rows: list[Row], shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """What a file's tensors become, path -> shape in our layout with layers counted: a config can be read off it.

    A key that some layers lack still counts them all: to name what is missing is for `placements`. ValueError if a
    tensor has another number of axes than its row says.
    """
    found, depths = Shapes(), _depths(rows, shapes)
    for row in rows:
        layers = _layers(row.key, depths) if "{}" in row.key else 1
        key = next((key for layer in range(layers) for key in _keys(row.key, layer) if key in shapes), None)
        if key is None:
            continue
        paths, shape, axes = _expand(row.path), tuple(shapes[key]), len(row.layout.split("->")[0])
        if len(shape) != axes:
            raise ValueError(f"{key} is {shape}, expected {axes} axes")
        shape = (shape[0] // len(paths), *shape[1:]) if len(paths) > 1 else shape
        shape = _forward_shape(row.layout, shape)
        found |= dict.fromkeys(paths, (layers, *shape) if "{}" in row.key else shape)
    return found


class Mismatch(ValueError):
    """Keys that are missing from a file, keys left over in it, and shapes that differ, all of them by name."""

    def __init__(self, missing: list[str], left_over: list[str], wrong: list[str]):
        self.missing, self.left_over, self.wrong = missing, left_over, wrong
        groups = [("missing", missing), ("left over", left_over), ("of another shape", wrong)]
        super().__init__("; ".join(f"{len(found)} {what}: {', '.join(found)}" for what, found in groups if found))


def placements(
    shapes: Mapping[str, tuple[int, ...]], rows: list[Row], params: Params, *, unused: Iterable[str] = ()
) -> dict[str, list[Slot]]:
    """Where each reference tensor goes, from names and shapes alone; keys the model has no use for are left out.

    Mismatch, a ValueError, lists every key that is missing or left over and every shape that differs.
    """
    expected = _expect(rows, params)
    placed, missing, wrong = {}, [], []
    for spellings, (slots, shape) in expected.items():
        found = [key for key in spellings if key in shapes]
        if len(found) != 1:
            missing.append(spellings[0] if not found else f"{' and '.join(found)} (one of them only)")
        elif tuple(shapes[found[0]]) != shape:
            wrong.append(f"{found[0]} is {tuple(shapes[found[0]])}, expected {shape}")
        else:
            placed[found[0]] = slots
    filled = {slot.path for slots, _ in expected.values() for slot in slots}
    missing += [f"anything for {path}" for path in sorted(flatten(params).keys() - filled)]
    known = {key for spellings in expected for key in spellings}
    left = sorted(key for key in shapes.keys() - known if not any(re.fullmatch(pattern, key) for pattern in unused))
    if missing or left or wrong:
        raise Mismatch(missing, left, wrong)
    return placed


def layers_as_in(shapes: Mapping[str, tuple[int, ...]], rows: list[Row], params: Params) -> dict[str, Shape]:
    """The shapes of `params`, path -> shape, with every stack as deep as it is in a file that has any of it."""
    flat, depths = {path: Shape(tuple(leaf.shape)) for path, leaf in flatten(params).items()}, _depths(rows, shapes)
    for row in rows:
        if "{}" in row.key:
            paths = [path for path in _expand(row.path) if path in flat]
            flat |= {
                path: Shape((_layers(row.key, depths) or flat[path].shape[0], *flat[path].shape[1:])) for path in paths
            }
    return flat


def pieces(
    tensors: Mapping[str, np.ndarray], placed: Mapping[str, list[Slot]]
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """(path, layer, values in our layout) for every slot of every tensor; each tensor is read once and let go of.

    Values are views where they can be. layer is None for a parameter that is not stacked.
    """
    for key, slots in placed.items():
        tensor = tensors[key]
        for slot in slots:
            part = tensor if slot.parts == 1 else np.split(tensor, slot.parts)[slot.part]
            yield slot.path, slot.layer, forward(slot.layout, part)


def to_kavatar(
    tensors: Mapping[str, np.ndarray],
    rows: list[Row],
    params: Params,
    *,
    unused: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Read reference tensors into our layout: a flat dict, path -> array, in the tensors' own dtype.

    tensors: each is read once and let go before the next; a lazy mapping has its shapes in `.shapes`. params: arrays or
    shapes that say what is wanted. unused: regular expressions of keys that the model has no use for. ValueError as
    `placements`.
    """
    shapes = getattr(tensors, "shapes", None) or {key: tensor.shape for key, tensor in tensors.items()}
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    flat: dict[str, np.ndarray] = {}
    for path, layer, values in pieces(tensors, placements(shapes, rows, params, unused=unused)):
        if path not in flat:
            flat[path] = np.empty(wanted[path], values.dtype)
        flat[path][() if layer is None else layer] = values
    return flat


def to_torch(params: Params, rows: list[Row]) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters as reference tensors, one at a time, C-contiguous and in their own dtype."""
    flat = flatten(params)
    for spellings, (slots, _) in _expect(rows, params).items():
        yield spellings[0], gather(flat, slots)


def sources(rows: list[Row], params: Params) -> dict[str, list[Slot]]:
    """Every reference key in its first spelling, and which of these parameters (arrays or shapes) it is made of.

    ValueError lists the parameters that no row has a key for.
    """
    expected = _expect(rows, params)
    homeless = flatten(params).keys() - {slot.path for slots, _ in expected.values() for slot in slots}
    if homeless:
        raise ValueError(f"{len(homeless)} have no name there: {', '.join(sorted(homeless))}")
    return {spellings[0]: slots for spellings, (slots, _) in expected.items()}


def reference_slots(rows: list[Row], params: Params) -> dict[str, tuple[list[Slot], tuple[int, ...]]]:
    """Every reference key of these parameters, in each of its spellings: what it fills, and its shape."""
    return {key: found for spellings, found in _expect(rows, params).items() for key in spellings}


def gather(tensors: Mapping[str, np.ndarray], slots: list[Slot]) -> np.ndarray:
    """One reference tensor, from ours by path; only those in `slots` are read."""
    parts = []
    for slot in slots:
        leaf = tensors[slot.path]
        parts.append(backward(slot.layout, np.asarray(leaf if slot.layer is None else leaf[slot.layer])))
    return contiguous(parts[0] if len(parts) == 1 else np.concatenate(parts))


def forward(layout: str, tensor: np.ndarray) -> np.ndarray:
    """Apply a layout such as "oi->io" or "c111->c"."""
    source, target = layout.split("->")
    kept = source.replace("1", "")
    return tensor.reshape([n for n, letter in zip(tensor.shape, source, strict=True) if letter != "1"]).transpose(
        [kept.index(letter) for letter in target]
    )


def backward(layout: str, array: np.ndarray) -> np.ndarray:
    """Undo a layout."""
    source, target = layout.split("->")
    kept = source.replace("1", "")
    return array.transpose([target.index(letter) for letter in kept])[
        tuple(None if letter == "1" else slice(None) for letter in source)
    ]


def contiguous(array: np.ndarray) -> np.ndarray:
    """In C order; a transposed matrix by strips that stay in the cache, at several times numpy's speed."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.asarray(array, order="C")
    ordered = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], STRIP):
        ordered[:, start : start + STRIP] = array[:, start : start + STRIP]
    return ordered


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}."""
    flat = {}
    for name, value in params.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """{"a/b/c": leaf} -> nested dict."""
    nested: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def _expect(rows: list[Row], params: Params) -> dict[tuple[str, ...], tuple[list[Slot], tuple[int, ...]]]:
    """(spellings of a key) -> its slots and its shape, for the rows whose parameters exist."""
    flat = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    expected = {}
    for row in rows:
        paths = _expand(row.path)
        if paths[0] not in flat:
            continue
        stacked = "{}" in row.key
        shape = flat[paths[0]][1:] if stacked else flat[paths[0]]
        reference = _backward_shape(row.layout, shape)
        reference = (reference[0] * len(paths), *reference[1:]) if len(paths) > 1 else reference
        for layer in range(flat[paths[0]][0]) if stacked else (None,):
            spellings = tuple(_keys(row.key, layer))
            slots = [Slot(path, row.layout, layer, part, len(paths)) for part, path in enumerate(paths)]
            assert spellings not in expected, f"two rows give {spellings}"
            expected[spellings] = (slots, tuple(reference))
    return expected


def _depths(rows: list[Row], keys: Iterable[str]) -> dict[str, int]:
    """Start of a stack's keys -> how many layers a file has of it.

    A layer counts if it has half as many of the rows' keys as the fullest one: one stray or one missing key is not to
    change how many layers are looked for.
    """
    keys = set(keys)
    templates = {key for row in rows if "{}" in row.key for key in row.key.split("|")}
    depths = {}
    for start in {key.split("{}")[0] for key in templates}:
        parts = (re.fullmatch(rf"{re.escape(start)}([0-9]+)(\..*)", key) for key in keys)
        layers = Counter(int(part[1]) for part in parts if part and f"{start}{{}}{part[2]}" in templates)
        fullest = max(layers.values(), default=0)
        deepest = (n for n, count in layers.items() if 2 * count >= fullest and n < len(keys))
        depths[start] = max(deepest, default=-1) + 1
    return depths


def _layers(template: str, depths: dict[str, int]) -> int:
    return max(depths[key.split("{}")[0]] for key in template.split("|"))


def _forward_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    source, target = layout.split("->")
    sizes = dict(zip(source, shape, strict=True))
    return tuple(sizes[letter] for letter in target)


def _backward_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    source, target = layout.split("->")
    sizes = dict(zip(target, shape, strict=True)) | {"1": 1}
    return tuple(sizes[letter] for letter in source)


def _keys(template: str, layer: int | None) -> Iterator[str]:
    for key in template.split("|"):
        yield key if layer is None else key.replace("{}", str(layer))


def _expand(path: str) -> list[str]:
    """a/{q,k}/b -> a/q/b, a/k/b."""
    found = re.search(r"\{(.+?)\}", path)
    if not found:
        return [path]
    return [path[: found.start()] + name + path[found.end() :] for name in found.group(1).split(",")]
