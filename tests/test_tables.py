"""Of every model: each parameter is matched by exactly one row of its two tables, and no row is idle."""

import re
from dataclasses import replace
from functools import partial

import jax
import pytest

from configs import demo, stableavatar
from kavatar_jax.checkpoint import bridge
from kavatar_jax.models import whisper
from kavatar_jax.models.components import COMPONENTS
from kavatar_jax.models.names import DIFFUSERS
from kavatar_jax.parallel.sharding import RULES

TINY = demo.tiny()
PLAIN = replace(TINY.dit, audio=None, image_width=None, in_channels=16)
TWO_LINEARS = replace(TINY.dit, audio=replace(stableavatar.fourteen_b().dit.audio, projection=(40, 48), mlp=64))
CONFIGS = {  # between them these use every row
    "dit": [TINY.dit, PLAIN, TWO_LINEARS, replace(TINY.dit, audio=None, image_positions=514)],
    "vae": [TINY.vae, replace(TINY.vae, multipliers=(2, 6, 10, 14), temporal=(True, True, True))],
    "text": [TINY.text],
    "image": [TINY.image],
    "speech": [TINY.speech, replace(TINY.speech, stable=True, conv_bias=True)],
}
MODELS = {name: (COMPONENTS[name].model, configs) for name, configs in CONFIGS.items()}
MODELS["whisper"] = (whisper, [demo.config().speech])


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    """(module, the parameters' shapes for each config)"""
    module, configs = MODELS[request.param]
    key = jax.random.key(0)
    return module, [bridge.flatten(jax.eval_shape(partial(module.init, config), key)) for config in configs]


def test_axes(model):
    module, parameters = model
    used = set()
    for flat in parameters:
        for path, leaf in flat.items():
            rows = [row for row in module.AXES if re.fullmatch(row, path)]
            assert len(rows) == 1, f"{path} is matched by {rows}"
            axes = module.AXES[rows[0]]
            assert len(axes) == leaf.ndim, f"{path} has shape {leaf.shape} and axes {axes}"
            assert set(axes) <= set(RULES), f"{path} has axes that RULES does not know: {axes}"
            used.update(rows)
    if module is COMPONENTS["dit"].model:  # what no released checkpoint holds
        used.update(row for row in module.AXES if any(name in row for name in ("director", "pack", "hear", "skip")))
    assert used == set(module.AXES)


def test_the_director_has_axes_and_no_reference():
    dit = COMPONENTS["dit"].model
    abstract = jax.eval_shape(partial(dit.init, replace(TINY.dit, director_width=20)), jax.random.key(0))
    flat = {path: leaf for path, leaf in bridge.flatten(abstract).items() if "director" in path}
    assert len(flat) == 9
    for path, leaf in flat.items():
        rows = [row for row in dit.AXES if re.fullmatch(row, path)]
        assert len(rows) == 1 and len(dit.AXES[rows[0]]) == leaf.ndim
    with pytest.raises(ValueError, match="director"):
        bridge.placements(bridge.reference_shapes(dit.TORCH, abstract), dit.TORCH, abstract)


def test_torch(model):
    module, parameters = model
    wanted = [path for row in module.TORCH for path in bridge._expand(row.path)]
    assert len(wanted) == len(set(wanted)), "two rows fill one parameter"
    for flat in parameters:
        assert set(flat) <= set(wanted), f"no row fills {sorted(set(flat) - set(wanted))}"
        shapes = bridge.reference_shapes(module.TORCH, bridge.unflatten(flat))
        back = bridge.parameter_shapes(module.TORCH, shapes)
        assert back == {path: leaf.shape for path, leaf in flat.items()}
        assert not [key for key in shapes if any(re.fullmatch(unused, key) for unused in module.UNUSED)]
    assert set(wanted) == set().union(*parameters), "idle rows"


@pytest.mark.parametrize("name", DIFFUSERS)
def test_names_of_diffusers(name):
    """Another name for every key, of one shape but where transformers keeps apart what is one in Wan."""
    names, plain = DIFFUSERS[name], PLAIN if name == "dit" else getattr(TINY, name)
    if name == "vae":
        plain = replace(plain, patch=1, bypass=False, blocks=2)
    for config in [plain, *([replace(PLAIN, image_width=20, image_positions=514)] if name == "dit" else [])]:
        abstract = jax.eval_shape(partial(names.model.init, config), jax.random.key(0))
        flat = bridge.flatten(abstract)
        shapes = bridge.reference_shapes(names.rows, abstract)
        assert bridge.parameter_shapes(names.rows, shapes) == {path: leaf.shape for path, leaf in flat.items()}
        assert bridge.sources(names.rows, abstract).keys() == shapes.keys()
        originals = bridge.reference_shapes(names.model.TORCH, abstract)
        assert names.model is COMPONENTS["image"].model or sorted(shapes.values()) == sorted(originals.values())
        assert not [key for key in shapes if any(re.fullmatch(unused, key) for unused in names.unused)]
