"""Products of 8-bit numbers: exact where the numbers are, and as near as rounding leaves them elsewhere."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model_dit import make_inputs

import kavatar_jax
from configs import demo, train_tiny
from kavatar_jax.cascade.weights import read_configs
from kavatar_jax.checkpoint.weights import load_component
from kavatar_jax.models import dit
from kavatar_jax.models.components import abstract
from kavatar_jax.nn import quantised
from kavatar_jax.nn.layers import Linear
from kavatar_jax.nn.quantised import FORMS
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import partition

product = jax.jit(quantised.quantised_matmul, static_argnums=2)
quantise = jax.jit(quantised.quantise, static_argnums=1, static_argnames="axis")


def test_whole_numbers_in_range_are_exact():
    """Rows and columns whose largest number is 127 have a scale of one."""
    rng = np.random.default_rng(0)
    x, kernel = rng.integers(-126, 127, (2, 3, 40)), rng.integers(-126, 127, (40, 5))
    x[..., 7], kernel[9] = 127, -127
    y = product(x.astype(np.float32), kernel.astype(np.float32), "int8")
    np.testing.assert_array_equal(y, x @ kernel)


def test_each_token_and_each_channel_has_its_own_scale():
    """One that is thousands of times as large costs the others nothing; powers of two are exact."""
    rng = np.random.default_rng(1)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 64), (64, 8)))
    rows, columns = np.float32(2) ** np.arange(0, 24, 4)[:, None], np.float32(2) ** np.arange(-8, 8, 2)
    scaled = product(x * rows, kernel * columns, "int8")
    np.testing.assert_array_equal(scaled, product(x, kernel, "int8") * rows * columns)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_come_back(form):
    """int8: to half a step of the largest's 127th part; fp8: to a 16th of each, three bits of mantissa."""
    x = np.random.default_rng(2).standard_normal((5, 300)).astype(np.float32)
    x[3] = 0
    numbers, scale = quantise(x, form, axis=-1)
    assert numbers.dtype == FORMS[form].dtype and scale.shape == (5, 1)
    error, step = np.abs(numbers.astype(jnp.float32) * scale - x), np.abs(x).max(axis=-1, keepdims=True)
    assert (error <= (step / 254 if form == "int8" else np.abs(x) / 16 + step * 2**-18) * 1.0001).all()


@pytest.mark.parametrize(("form", "low", "high"), [("int8", 0.004, 0.012), ("fp8", 0.02, 0.05)])
def test_error_of_a_product_of_gaussians(form, low, high):
    """int8: rounded in steps of 3.2 / 127 on both sides, 0.0104 together. fp8: in steps of an eighth of the power of two
    below each number, 0.033."""
    rng = np.random.default_rng(3)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in ((256, 1024), (1024, 256)))
    error = np.linalg.norm(product(x, kernel, form) - x @ kernel) / np.linalg.norm(x @ kernel)
    assert low < error < high


@pytest.mark.parametrize("form", FORMS)
def test_operands_spread_over_a_mesh_give_the_same_product(form):
    """A channel's scale is of its whole column, wherever its parts lie; sums of int8 products are exact in any order."""
    rng = np.random.default_rng(5)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 24, 64), (64, 32)))
    mesh = make_mesh(2, 2, 1, 2)
    places = (jax.P("data", "context"), jax.P("fsdp", "tensor"))
    spread = (jax.device_put(array, jax.NamedSharding(mesh, at)) for array, at in zip((x, kernel), places, strict=True))
    np.testing.assert_allclose(
        product(*spread, form), product(x, kernel, form), rtol=0 if form == "int8" else 1e-5, atol=1e-5
    )


def test_a_linear_layer_keeps_its_parameters_and_its_bias():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((2, 7, 32)), jnp.float32)
    kernel = jax.random.normal(jax.random.key(0), (32, 16)) / 32**0.5
    variables = {"params": {"kernel": kernel, "bias": jnp.arange(16.0)}}
    plain, rounded = (
        jax.jit(Linear(16, "float32", "float32", quantised=form).apply)(variables, x) for form in ("", "int8")
    )
    assert 0 < np.abs(rounded - plain).max() < 0.1


def test_products_of_the_blocks_are_of_8_bits():
    config = dataclasses.replace(demo.tiny().dit, quantised="int8")
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    text = jax.jit(dit.DiT(config).apply).lower({"params": params}, make_inputs(config)).as_text()
    lines = [line for line in text.splitlines() if "dot_general" in line and "xi8>" in line]
    # of the one block that is scanned: self-attention and the words 4 each, the portrait 2, speech 2, the MLP 2
    assert len(lines) == 14


@pytest.mark.slow
def test_velocity_of_the_demo_stays_near():
    """The errors that docs/performance.md gives, printed with -s."""
    folder = Path(kavatar_jax.__file__).parent / "demo"
    config = read_configs(folder, demo.config()).dit
    wanted = abstract("dit", config)
    places = partition(wanted, dit.AXES, make_mesh(1, devices=jax.devices()[:1]))
    inputs = make_inputs(config, timestep=jnp.array([900.0, 300.0]))  # a step of the demo's schedule is never near 0
    params = load_component(folder / "dit", wanted, places)
    run = jax.jit(
        lambda params, inputs, config: dit.DiT(config).apply({"params": params}, inputs).velocity, static_argnums=2
    )
    exact = np.asarray(run(params, inputs, config))
    for form, most in (("int8", 0.04), ("fp8", 0.1)):
        rounded = np.asarray(run(params, inputs, dataclasses.replace(config, quantised=form)))
        error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        print(f"{form}: relative error of the velocity {error:.4f}")
        assert 1e-4 < error < most


def test_training_refuses_it():
    config = train_tiny.config()
    model = dataclasses.replace(config.model, dit=dataclasses.replace(config.model.dit, quantised="int8"))
    with pytest.raises(ValueError, match="rounding has no gradient"):
        dataclasses.replace(config, model=model)


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="dit.quantised is 'int4'; choose one of '', int8, fp8"):
        dataclasses.replace(demo.config().dit, quantised="int4")
