"""Of every model: each parameter is matched by exactly one row of its two tables, and no row is idle."""

import re
from dataclasses import replace
from functools import partial

import jax
import pytest

from kavatar_jax.checkpoint import bridge
from kavatar_jax.config import CLIPConfig, UMT5Config, Wav2Vec2Config
from kavatar_jax.models import clip, umt5, wav2vec2
from kavatar_jax.parallel.sharding import RULES

UMT5 = UMT5Config(vocabulary=50, width=16, heads=2, head_width=8, mlp=24, layers=2)
CLIP = CLIPConfig(width=16, heads=2, layers=2, mlp=24, image_size=28, patch=14, embedding=6)
WAV2VEC2 = Wav2Vec2Config(
    width=16,
    heads=2,
    layers=2,
    mlp=24,
    conv_widths=(8,) * 7,
    conv_kernels=(10, 3, 3, 3, 3, 2, 2),
    conv_strides=(5, 2, 2, 2, 2, 2, 2),
    position_kernel=4,
    position_groups=2,
    stable=False,
    conv_bias=False,
)
MODELS = {  # module, and configs that between them use every row
    "umt5": (umt5, [UMT5]),
    "clip": (clip, [CLIP]),
    "wav2vec2": (wav2vec2, [WAV2VEC2, replace(WAV2VEC2, stable=True, conv_bias=True)]),
}


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
    assert used == set(module.AXES)


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
