"""Programs compile for TPUs that are not there, with the kernel that TPUs are for, do the work expected and fit the memory.

Needs libtpu (the extra `aot`). It is asked in a process of its own, because it must find its environment when it is loaded.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# two narrow layers with heads of 128, as in the published models
FIELDS = (
    "dit.width=256", "dit.heads=2", "dit.layers=2", "dit.audio.heads=2", "dit.audio.projection=(256,)",
    "dit.dtype=bfloat16", "dit.param_dtype=bfloat16", "sampling.window_frames=21", "sampling.overlap=2",
)  # fmt: skip
V5E_BYTES = 15.75 * 2**30


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu; pip install '.[aot]'")


@pytest.mark.parametrize("mesh", ["4 1 1 1", "2 1 2 1"])
def test_a_sampling_step_compiles_for_four_v5e_chips(mesh, tmp_path):
    report = compile_step("--topology", "v5e:2x2", "--mesh", *mesh.split(), out=tmp_path / "report.json")
    print(f"peak {report['peak_bytes'] / 2**20:.1f} MiB per chip, sent {report['sent']}")
    # self-attention, and cross-attention to the words and to the portrait, in both layers
    assert report["kernels"] == 6
    assert 0 < report["argument_bytes"] < report["peak_bytes"] < V5E_BYTES
    assert report["program_to_expected"] == pytest.approx(1, abs=0.05)
    if mesh == "4 1 1 1":  # whole networks on every chip: only the fusion of neighbouring windows communicates
        assert set(report["sent"]) == {"collective-permute"}
    else:  # heads for tokens in self-attention; no tokens are gathered, not even once, only latents
        assert report["sent"]["all-to-all"] > 0
        assert report["sent"]["all-gather"] < 2 * 6 * 1024 * 256


@pytest.mark.slow
def test_weights_over_sixteen_chips_do_the_same_work(tmp_path):
    """Gathers of weights become loops of permutations and partial products, which are counted as often as they run."""
    report = compile_step("--topology", "v5e:4x4", "--mesh", "1", "16", "1", "1", out=tmp_path / "report.json")
    assert report["sent"]["collective-permute"] > 0
    assert report["program_to_expected"] == pytest.approx(1, abs=0.05)


KERNEL = """
import jax, jax.numpy as jnp
from kavatar_jax.nn.attention import attend
from kavatar_jax.parallel.mesh import make_mesh
from tools.benchmarks.absent import absent_devices
devices = absent_devices("{topology}")
with jax.set_mesh(make_mesh(1, devices=devices[:1])):
    array = jax.ShapeDtypeStruct((1, {tokens}, 1, 128), jnp.bfloat16)
    program = jax.jit(attend).trace(array, array, array).lower(lowering_platforms=("tpu",)).compile()
assert "dense_attention" in program.as_text()
print(program.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.parametrize("tokens", [32760, 75600])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_chip_has_room_for_its_blocks(topology, tokens):
    command = [sys.executable, "-c", KERNEL.format(topology=topology, tokens=tokens)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    # no logits: what is kept beside the result is of the tokens' size
    assert int(run.stdout) < 16 * tokens * 128


MESH = """
from kavatar_jax.parallel.mesh import make_mesh
from tools.benchmarks.aot import absent_devices
print(make_mesh(*{sizes}, devices=absent_devices("{topology}")).devices.shape)
"""


@pytest.mark.parametrize(("topology", "sizes"), [("v6e:4x4", (2, 2, 2, 2)), ("v5p:4x4x4", (2, 8, 2, 2))])
def test_a_mesh_may_cut_an_axis_of_the_torus_in_two(topology, sizes):
    command = [sys.executable, "-c", MESH.format(topology=topology, sizes=sizes)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.stdout.strip() == str(sizes), run.stderr[-3000:]


PRODUCT = """
import jax, jax.numpy as jnp
from kavatar_jax.nn.quantised import quantised_matmul
from kavatar_jax.parallel.mesh import make_mesh
from tools.benchmarks.aot import absent_devices
devices = absent_devices("{topology}")
with jax.set_mesh(make_mesh(1, devices=devices[:1])):
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4096, 1536), (1536, 1536)))
    traced = jax.jit(quantised_matmul, static_argnums=2).trace(x, kernel, "{form}")
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
print(text)
"""


@pytest.mark.parametrize(("form", "total"), [("int8", "s32"), ("fp8", "f32")])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_quantised_products_are_of_8_bits(topology, form, total):
    command = [sys.executable, "-c", PRODUCT.format(topology=topology, form=form)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    operations = {name: kind for name, kind in re.findall(r"%([\w.\-]+) = (\w+)\[", run.stdout)}
    [product] = re.findall(r"%([\w.\-]+) = .* convolution\(%([\w.\-]+), %([\w.\-]+)\)", run.stdout)
    operands = "s8" if form == "int8" else "f8e4m3fn"
    assert [operations[name] for name in product] == [total, operands, operands]


def test_a_slice_that_does_not_exist_is_refused():
    run = start("--topology", "v5e:3x3")
    assert run.returncode == 2
    assert "v5e:3x3" in run.stderr and "Traceback" not in run.stderr


def compile_step(*arguments: str, out: Path) -> dict:
    run = start(*arguments, "--json", str(out))
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(out.read_text())


def start(*arguments: str) -> subprocess.CompletedProcess:
    fields = [word for field in FIELDS for word in ("--set", field)]
    command = [sys.executable, "-m", "tools.bench", "aot", "--config", "stableavatar", *fields, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
