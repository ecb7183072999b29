"""LoRA files: read under whatever names a network goes by, added to its weights, written. Knows no model.

A file holds branches, whose product `up @ down` is added to a tensor, and differences, which are added as they are. Read are
the namings of diffusers and peft (`lora_A`, `lora_B`), kohya, musubi and StableAvatar (`lora_unet_`, dots as underscores),
and lightx2v (`lora_down`, `.diff`, `.diff_b`, `.diff_m`), for modules under any of the names that the caller has rows for.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kavatar_jax.checkpoint.bridge import Row, forward, reference_slots
from kavatar_jax.checkpoint.files import Parts, SafetensorsWriter, Tensors, parse_json, read_json
from kavatar_jax.types import Params

METADATA = "lora_adapter_metadata"  # where diffusers keeps what peft keeps in adapter_config.json
WRITTEN = {  # naming -> what stands before a module's name and after it
    "diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight"),
}
_PREFIXES = re.compile(
    r"^((base_model\.model|model|diffusion_model|transformer|pipe|dit)\.|lora_(unet|transformer)__?)+"
)
_ENDS = {
    "down": r"\.lora(_A|_down|\.down)(\.\w+)?\.weight$",
    "up": r"\.lora(_B|_up|\.up)(\.\w+)?\.weight$",
    "bias": r"\.lora(_B|_up|\.up)(\.\w+)?\.bias$",
    **{name: rf"\.{name}$" for name in ("alpha", "diff", "diff_b", "diff_m")},
}
_FOREIGN = re.compile(r".*(hada_|lokr_|dora_scale|lora_magnitude_vector|oft_).*")


@dataclass(frozen=True)
class Change:
    """Scale times `up @ down`, or times `diff`, in the layout of the reference's tensor; for its part in our parameter.

    down: (rank, in, ...); up: (out, rank, ...); layout: from the reference's axes to ours
    """

    layout: str
    scale: float
    down: np.ndarray | None = None
    up: np.ndarray | None = None
    diff: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the reference's tensor."""
        if self.down is None or self.up is None:
            assert self.diff is not None
            return self.diff.shape
        return self.up.shape[0], *self.down.shape[1:]

    def delta(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """What is added to our parameter, or to a part of it: float32, in our layout."""
        source, target = self.layout.split("->")
        cuts = dict(zip(target, index, strict=True)) if index is not None else {}
        cut = tuple(cuts.get(letter, slice(None)) for letter in source)
        if self.down is None or self.up is None:
            assert self.diff is not None
            delta = self.diff[cut].astype(np.float32)
        else:
            down, up = self.down[(slice(None), *cut[1:])].astype(np.float32), self.up[cut[0]].astype(np.float32)
            delta = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            delta = delta.reshape(len(up), *down.shape[1:])
        return forward(self.layout, delta * np.float32(self.scale))


# our path -> layer, None where there are none -> what is added
Changes = Mapping[str, Mapping[int | None, list[Change]]]


class Merged(Parts):
    """A component's tensors with changes added to them, in float32, and rounded once to the dtype that they are kept in."""

    def __init__(self, tensors: Parts, changes: Changes):
        self.shapes, self.dtypes = tensors.shapes, tensors.dtypes
        self._tensors, self._changes = tensors, changes

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor; only its own part of each change is computed."""
        values = self._tensors.part(name, index)
        for layer, found in self._changes.get(name, {}).items():
            if layer is None:
                values = add(values, found, index)
            elif layer in (layers := range(self.shapes[name][0])[index[0]]):
                row = layers.index(layer)
                values[row] = add(values[row], found, index[1:])
        return np.asarray(values, self.dtypes[name])


def add(values: np.ndarray, changes: Iterable[Change], index: tuple[slice, ...] | None = None) -> np.ndarray:
    """A parameter's values, or those of a part of it, with changes: float32."""
    total = values.astype(np.float32)
    for change in changes:
        total += change.delta(index)
    return total


def parse(word: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE; the scale is 1 where none is given."""
    path, _, number = word.rpartition(":")
    try:
        scale = float(number) if path else 1.0
    except ValueError:  # a colon of the file's name
        return Path(word), 1.0
    if not np.isfinite(scale):
        raise ValueError(f"--lora {word}: a scale is a finite number, as in {path}:0.8")
    return Path(path or word), scale


def read_loras(
    files: Iterable[tuple[Path, float]], names: list[list[Row]], params: Params, *, unused: str = "refuse"
) -> dict[str, dict[int | None, list[Change]]]:
    """What several files, each times its scale, add to these parameters (arrays or shapes).

    names: tables of the names that modules may go by; unused: "refuse" or "ignore" tensors that nothing here is for.
    ValueError, in one line, names the file and all of its tensors that are not used, do not fit or lack their counterpart.
    """
    if unused not in ("refuse", "ignore"):
        raise ValueError(f"--lora-unused {unused} is not one of refuse, ignore")
    merged: dict[str, dict[int | None, list[Change]]] = {}
    for path, scale in files:
        changes, left = read_lora(path, names, params)
        if not changes or (left and unused == "refuse"):
            hint = "; leave them out with --lora-unused ignore" if changes else ", which is all of them"
            raise ValueError(f"{path} has {len(left)} tensors that nothing here is for: {', '.join(left)}{hint}")
        for (name, layer), found in changes.items():
            scaled = [replace(change, scale=change.scale * scale) for change in found]
            merged.setdefault(name, {}).setdefault(layer, []).extend(scaled)
    return merged


def read_lora(
    path: Path, names: list[list[Row]], params: Params
) -> tuple[dict[tuple[str, int | None], list[Change]], list[str]]:
    """({(our path, layer): what is added to it}, the tensors that nothing here is for). ValueError as `read_loras`."""
    tensors = Tensors(path)
    foreign = [key for key in tensors if _FOREIGN.fullmatch(key)]
    if foreign:
        raise ValueError(f"{path} is not a plain LoRA: it has {', '.join(foreign[:3])}; have it merged by what made it")
    homes = _homes(names, params)
    modules, left = _by_module(path, tensors)
    told, changes = _told(path, tensors), {}
    for module, parts in modules.items():
        read = {part: tensors[key] for part, key in parts.items()}
        _check(path, parts, read)
        for target, made_of, change in _changes(module, read, told):
            keys = [parts[part] for part in made_of]
            if (home := homes.get(target) or homes.get(target.removesuffix("_weight"))) is None:
                left += keys
                continue
            (slot,), shape = home
            if change.shape != shape:
                raise ValueError(f"{path}: {keys[0]} is for {change.shape}, and here it is {shape}: of another model")
            changes.setdefault((slot.path, slot.layer), []).append(replace(change, layout=slot.layout))
    return changes, sorted(left)


def write_lora(
    path: Path, branches: Mapping[tuple[str, int | None], Change], rows: list[Row], params: Params, naming: str
) -> None:
    """Write branches of these parameters (arrays or shapes), by (path, layer), in a naming of WRITTEN: bits as they are.

    rows: the names that modules go by there. ValueError lists the branches that have none. Their scale stands beside each
    in kohya's naming; diffusers keeps it in the file's metadata.
    """
    keys = {(slots[0].path, slots[0].layer): key for key, (slots, _) in reference_slots(rows, params).items()}
    homeless = sorted({name for name, layer in branches if (name, layer) not in keys})
    if homeless:
        raise ValueError(f"{naming} has no name for branches of {', '.join(homeless)}")
    start, down, up = WRITTEN[naming]
    tensors, alphas, ranks = {}, {}, {}
    for home, branch in branches.items():
        assert branch.down is not None and branch.up is not None, home
        module = keys[home].removesuffix(".weight")
        ranks[module], alphas[module] = len(branch.down), branch.scale * len(branch.down)
        stem = start + (module.replace(".", "_") if naming == "kohya" else module)
        tensors[stem + down], tensors[stem + up] = branch.down, branch.up
        if naming == "kohya":
            tensors[f"{stem}.alpha"] = np.float32(alphas[module])
    metadata = {"format": "pt"} | ({METADATA: _adapter(ranks, alphas)} if naming == "diffusers" else {})
    described = {key: (np.shape(x), np.asarray(x).dtype) for key, x in tensors.items()}
    with SafetensorsWriter(path, described, metadata) as writer:
        for key, values in tensors.items():
            writer.write(key, values)


def _homes(names: list[list[Row]], params: Params) -> dict[str, tuple]:
    """Squashed reference key, under every name -> its slots and shape."""
    homes: dict[str, tuple] = {}
    for rows in names:
        for key, home in reference_slots(rows, params).items():
            known = homes.setdefault(_squash(key), home)
            assert known == home, f"{key} is the name of two"
    return homes


def _by_module(path: Path, tensors: Tensors) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{squashed module: {part of _ENDS: key}}, and the keys that are no such part."""
    modules, left = {}, []
    for key in tensors:
        part, match = next(
            ((part, found) for part, end in _ENDS.items() if (found := re.search(end, key))), (None, None)
        )
        if part is None or match is None:
            left.append(key)
            continue
        found = modules.setdefault(_squash(_PREFIXES.sub("", key[: match.start()])), {})
        if part in found:
            raise ValueError(f"{path} says twice what {found[part]} and {key} say")
        found[part] = key
    halves = [parts.get("down") or parts["up"] for parts in modules.values() if ("down" in parts) != ("up" in parts)]
    if halves:
        raise ValueError(f"{path} has {', '.join(halves)} without the other half of the branch")
    left += [parts["alpha"] for parts in modules.values() if "alpha" in parts and "down" not in parts]
    return modules, left


def _check(path: Path, parts: dict[str, str], read: dict[str, np.ndarray]) -> None:
    if "alpha" in read and read["alpha"].size != 1:
        raise ValueError(f"{path}: {parts['alpha']} is {read['alpha'].shape}, expected one number")
    if "down" in read:
        down, up = read["down"].shape, read["up"].shape
        if min(len(down), len(up)) < 2 or up[1] != down[0] or set(up[2:]) - {1}:
            raise ValueError(f"{path}: {parts['down']} is {down} and {parts['up']} {up}, which make no product")


def _changes(module: str, read: dict[str, np.ndarray], told: dict) -> Iterator[tuple[str, list[str], Change]]:
    """For each tensor that a module's parts are for: its key, the parts, what they add to it; its layout is not known."""
    scale = 1.0
    if "down" in read and "up" in read:
        scale = _scale(module, read, told)
        parts = [part for part in ("down", "up", "alpha") if part in read]
        yield f"{module}_weight", parts, Change("", scale, down=read["down"], up=read["up"])
    if "diff" in read:
        yield f"{module}_weight", ["diff"], Change("", 1.0, diff=read["diff"])
    if "bias" in read:
        yield f"{module}_bias", ["bias"], Change("", scale, diff=read["bias"])
    if "diff_b" in read:
        yield f"{module}_bias", ["diff_b"], Change("", 1.0, diff=read["diff_b"])
    if "diff_m" in read:
        yield f"{module}_modulation", ["diff_m"], Change("", 1.0, diff=read["diff_m"])


def _scale(module: str, read: dict[str, np.ndarray], told: dict) -> float:
    """alpha / rank; 1 where there is no alpha, or where it is 0, which is kohya's word for none."""
    rank = len(read["down"])
    if "alpha" in read:
        return read["alpha"].item() / rank or 1.0
    patterns = told.get("alpha_pattern") or {}
    alpha = next((x for key, x in patterns.items() if re.fullmatch(rf"(.*_)?({key})", module)), told.get("lora_alpha"))
    return 1.0 if alpha is None else alpha / (rank**0.5 if told.get("use_rslora") else rank)


def _told(path: Path, tensors: Tensors) -> dict:
    """What peft's config says of the branches, in the file's metadata or beside it."""
    beside = path.with_name("adapter_config.json")
    if METADATA in tensors.metadata:
        said = parse_json(path, tensors.metadata[METADATA].encode())
        told = {key.removeprefix("transformer."): value for key, value in said.items()}
    else:
        told = read_json(beside) if path.stem == "adapter_model" and beside.is_file() else {}
    if told.get("use_dora"):
        raise ValueError(f"{path} is not a plain LoRA but a DoRA; have it merged by what made it")
    return told


def _adapter(ranks: dict[str, int], alphas: dict[str, float]) -> str:
    """peft's config of these modules: the commonest rank and alpha for all, the others by name."""
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    said = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(ranks),
        "rank_pattern": {module: x for module, x in ranks.items() if x != rank},
        "alpha_pattern": {module: x for module, x in alphas.items() if x != alpha},
    }  # fmt: skip
    return json.dumps({f"transformer.{key}": value for key, value in said.items()})


def _squash(key: str) -> str:
    return key.replace(".", "_")
