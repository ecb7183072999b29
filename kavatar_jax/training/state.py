"""What a run carries from step to step, and how it begins: which parameters learn, from where they start, where they live.

Parameters are {"params": {component: ...}, "lora": {component: ...}}, cut in two by path: the part that learns, kept in
float32 whatever the model stores, and the frozen part.
"""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kavatar_jax.checkpoint.bridge import flatten, unflatten
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.checkpoint.weights import load_component
from kavatar_jax.models.components import COMPONENTS, abstract, model_of, read_stored
from kavatar_jax.parallel.sharding import partition, replicated
from kavatar_jax.training.config import LoRAConfig, OptimizerConfig, TrainConfig, TrainedConfig
from kavatar_jax.training.optimizer import make_optimizer
from kavatar_jax.types import Params


class TrainState(NamedTuple):
    """step: optimiser steps done; healthy: False once a step was not finite, after which nothing changes any more

    trained: masters, float32; optimizer: optax's state; ema: averages of `trained`, None if none are kept
    """

    step: jax.Array
    healthy: jax.Array
    trained: Params
    optimizer: optax.OptState
    ema: Params | None


def learning(config: TrainConfig) -> frozenset[str]:
    """The components of which something learns."""
    names = set()
    for component in COMPONENTS:
        paths = flatten({component: abstract(component, getattr(config.model, component))})
        lora = config.trained.lora
        if any(learns(path, config.trained) or (lora and _matches(path, lora.patterns)) for path in paths):
            names.add(component)
    return frozenset(names)


def learns(path: str, config: TrainedConfig) -> bool:
    """Whether a parameter, "component/path", is one of those that are trained."""
    return _matches(path, config.patterns) and not _matches(path, config.frozen)


def is_fresh(path: str, config: TrainConfig) -> bool:
    """Whether a parameter, "component/path", starts from chance."""
    return not config.weights or _matches(path, config.fresh)


def drawn_anew(config: TrainConfig) -> frozenset[str]:
    """The components of which something starts from chance."""
    return frozenset(name for name in COMPONENTS if _any_fresh(name, config))


def adopt(config: TrainConfig) -> TrainConfig:
    """The run with its frozen helpers as the weights directory describes them, latent statistics above all.

    The transformer stays as the run wants it, and every network keeps the run's dtypes.
    """
    found = {}
    for name in COMPONENTS.keys() - {"dit"} - drawn_anew(config):
        if (Path(config.weights) / name / "config.json").is_file():
            found[name] = read_stored(Path(config.weights), name, getattr(config.model, name))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **found))


def begin(config: TrainConfig, components: list[str], mesh) -> tuple[TrainState, Params, TrainState]:
    """The state at step 0, the frozen parameters, and the state's shardings.

    components: the networks that the task needs. ValueError if nothing learns, or if the weights do not fit.
    """
    params, axes = {}, {}
    for name in components:
        part = getattr(config.model, name)
        model = model_of(name, part)
        rows = {rf"{name}/{row}": value for row, value in model.AXES.items()}
        axes |= {f"params/{row}": value for row, value in rows.items()}
        places = partition({name: abstract(name, part)}, rows, mesh)[name]
        params[name] = _materialise(config, name, places)
    lora = {}
    if config.trained.lora is not None:
        linears = find_linears(params, config.trained.lora, axes)
        axes |= lora_axes(linears)
        shapes = jax.eval_shape(lambda: draw_lora(params, linears, config.trained.lora, config.seed))
        places = partition({"lora": shapes}, axes, mesh)["lora"]
        lora = jax.jit(lambda: draw_lora(params, linears, config.trained.lora, config.seed), out_shardings=places)()
    trained, frozen = split({"params": params, "lora": lora}, config.trained)
    if not trained:
        raise ValueError(f"trained.patterns {config.trained.patterns} match no parameter, and there is no LoRA")
    places = partition(trained, axes, mesh)
    trained = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree), out_shardings=places)(trained)
    fresh, shardings = plan_state(trained, places, config.optimizer, config.steps, mesh)
    return fresh(trained), frozen, shardings


def plan_state(trained: Params, places: Params, config: OptimizerConfig, steps: int, mesh):
    """-> the function that makes the state at step 0 of what learns, which it uses up, and the state's shardings.

    trained: float32 masters, or their shapes; places: where they live
    """
    optimizer, whole, flat = make_optimizer(config, steps), replicated(mesh), flatten(places)

    def place(path, _):  # a slot lies where its parameter does, whatever the optimizer wraps it in
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        tails = ("/".join(names[start:]) for start in range(len(names)))
        return next((flat[tail] for tail in tails if tail in flat), whole)

    slots = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, trained))
    shardings = TrainState(whole, whole, places, slots, places if config.ema else None)

    def fresh(trained):
        ema = jax.tree.map(jnp.copy, trained) if config.ema else None
        return TrainState(jnp.zeros((), jnp.int32), jnp.ones((), bool), trained, optimizer.init(trained), ema)

    return jax.jit(fresh, out_shardings=shardings, donate_argnums=0), shardings


def split(tree: Params, config: TrainedConfig) -> tuple[Params, Params]:
    """What learns and what is frozen; of a LoRA branch everything but its scale learns."""
    trained, frozen = {}, {}
    for path, leaf in flatten(tree).items():
        kind, _, rest = path.partition("/")
        chosen = not rest.endswith("/scale") if kind == "lora" else learns(rest, config)
        (trained if chosen else frozen)[path] = leaf
    return unflatten(trained), unflatten(frozen)


def join(trained: Params, frozen: Params) -> Params:
    """{"params": ..., "lora": ...} made whole again."""
    whole = unflatten(flatten(trained) | flatten(frozen))
    return {"params": whole.get("params", {}), "lora": whole.get("lora", {})}


def find_linears(params: Params, config: LoRAConfig, axes: dict) -> dict[str, tuple]:
    """The linears that get a branch, component/path -> logical axes of the kernel; "layers" first where it is stacked."""
    found = {}
    for path, kernel in flatten(params).items():
        logical = next(axes[row] for row in axes if re.fullmatch(row, f"params/{path}"))
        is_linear = path.endswith("/kernel") and kernel.ndim - (logical[0] == "layers") == 2
        if is_linear and _matches(path, config.patterns):
            found[path.removesuffix("/kernel")] = logical
    if not found:
        raise ValueError(f"trained.lora.patterns {config.patterns} match no linear")
    return found


def lora_axes(linears: dict[str, tuple]) -> dict[str, tuple]:
    axes = {}
    for path, (*layers, inputs, outputs) in linears.items():
        row = re.escape(f"lora/{path}")
        axes |= {rf"{row}/down": (*layers, inputs, None), rf"{row}/up": (*layers, None, outputs)}
        axes[rf"{row}/scale"] = tuple(layers)
    return axes


def draw_lora(params: Params, linears: dict[str, tuple], config: LoRAConfig, seed: int) -> Params:
    """Fresh branches; up is zero, so nothing changes at first. Only the shapes of `params` are used."""
    flat, lora = flatten(params), {}
    for number, path in enumerate(linears):
        *layers, inputs, outputs = flat[f"{path}/kernel"].shape
        key = jax.random.fold_in(jax.random.key(seed), number)
        bound = inputs**-0.5  # Kaiming's uniform with a = sqrt(5), torch's own for a linear
        down = jax.random.uniform(key, (*layers, inputs, config.rank), minval=-bound, maxval=bound)
        lora[f"{path}/down"], lora[f"{path}/up"] = down, jnp.zeros((*layers, config.rank, outputs))
        lora[f"{path}/scale"] = jnp.full(layers, config.scale)
    return unflatten(lora)


def fold_lora(params: Params, lora: Params) -> Params:
    """Parameters of one component with the branches added into their kernels."""
    flat, branches = dict(flatten(params)), flatten(lora)
    for path in [path for path in branches if path.endswith("/down")]:
        where = path.removesuffix("/down")
        down, up, scale = (branches[f"{where}/{name}"] for name in ("down", "up", "scale"))
        kernel = flat[f"{where}/kernel"]
        flat[f"{where}/kernel"] = (kernel + (down @ up) * scale[..., None, None]).astype(kernel.dtype)
    return unflatten(flat)


def _materialise(config: TrainConfig, name: str, places: Params) -> Params:
    """One network's parameters on the mesh: from the weights directory, what is to be fresh drawn anew."""
    part, wanted = getattr(config.model, name), flatten(abstract(name, getattr(config.model, name)))
    anew = [path for path in wanted if is_fresh(f"{name}/{path}", config)]
    flat, flat_places = {}, flatten(places)
    if len(anew) < len(wanted):
        stored = unflatten({path: leaf for path, leaf in wanted.items() if path not in anew})
        stored_places = unflatten({path: place for path, place in flat_places.items() if path not in anew})
        folder = Path(config.weights) / name
        unread = [path for path in Tensors(folder / "model.safetensors") if is_fresh(f"{name}/{path}", config)]
        flat |= flatten(load_component(folder, stored, stored_places, unread=unread))
    if anew:
        key = jax.random.fold_in(jax.random.key(config.seed), list(COMPONENTS).index(name))
        draw = jax.jit(lambda key: _pick(model_of(name, part).init(part, key), anew), out_shardings=_pick(places, anew))
        flat |= flatten(draw(key))
    return unflatten({path: flat[path] for path in wanted})


def _any_fresh(name: str, config: TrainConfig) -> bool:
    paths = flatten({name: abstract(name, getattr(config.model, name))})
    return any(is_fresh(path, config) for path in paths)


def _pick(tree: Params, paths: list[str]) -> Params:
    flat = flatten(tree)
    return unflatten({path: flat[path] for path in paths})


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)
