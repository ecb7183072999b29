"""Programs compile for TPUs that are not there, with the kernel that TPUs are for, do the work expected and fit the memory.

Needs libtpu, which is asked in a process of its own, because it must find its environment when it is loaded.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# two narrow layers with heads of 128, as in the published models
NARROW = ("dit.width=256", "dit.heads=2", "dit.layers=2", "dit.audio.heads=2", "dit.audio.projection=(256,)")
FIELDS = (
    *NARROW, "dit.dtype=bfloat16", "dit.param_dtype=bfloat16", "sampling.window_frames=21", "sampling.overlap=2",
)  # fmt: skip
V5E_BYTES = 15.75 * 2**30


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu; `make parity` installs it")


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
@pytest.mark.parametrize("mesh", ["1 16 1 1", "1 8 1 2"])
def test_weights_over_sixteen_chips_do_the_same_work(mesh, tmp_path):
    report = compile_step("--topology", "v5e:4x4", "--mesh", *mesh.split(), out=tmp_path / "report.json")
    assert report["program_to_expected"] == pytest.approx(1, abs=0.05)
    velocities = 2 * 6 * 64 * 64 * 16 * 4  # of a window, to either neighbour
    if mesh == "1 16 1 1":  # kernels are gathered, whole where they are used
        assert report["sent"]["collective-permute"] <= velocities < report["sent"]["all-gather"]
    else:  # gathers become loops of permutations and partial products, which are counted as often as they run
        assert report["sent"]["collective-permute"] > 2 * velocities


@pytest.mark.slow
def test_a_training_step_keeps_attention_and_has_its_gradients_from_one_kernel(tmp_path):
    """The work expected is that of blocks done twice but for self-attention, and five products for its gradients."""
    mesh = ("--topology", "v5e:2x2", "--mesh", "1", "4", "1", "1")
    arguments = ("--task", "train", "--size", "416x240", *mesh)
    report = compile_step(
        *arguments,
        config="train_stableavatar",
        fields=[f"model.{field}" for field in NARROW],
        out=tmp_path / "report.json",
    )
    # in both layers: attention to itself, to words and to the portrait, and the gradients of each; the latter two again
    assert report["kernels"] == 2 * (3 + 3 + 2)
    assert report["program_to_expected"] == pytest.approx(1, abs=0.05)
    assert report["argument_bytes"] < report["peak_bytes"] < V5E_BYTES


def test_words_are_read_by_weights_that_wait_in_the_hosts_memory(tmp_path):
    """Each of four chips brings a quarter of them, and they gather a layer at a time."""
    report = compile_step(
        "--task", "read", "--topology", "v5e:2x2", fields=["text.layers=3"], out=tmp_path / "report.json"
    )
    layer = 2 * 4096 * (4 * 4096 + 3 * 10240)
    table = 2 * 256384 * 4096
    assert report["host_bytes"] == (3 * layer + table) / 4
    assert report["argument_bytes"] < 2**20 and report["peak_bytes"] < table / 4 + layer
    assert 3 * layer * 3 / 4 < report["sent"]["all-gather"] < 3.3 * layer * 3 / 4


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
    run = python(KERNEL.format(topology=topology, tokens=tokens))
    assert run.returncode == 0, run.stderr[-3000:]
    # no logits: what is kept beside the result is of the tokens' size
    assert int(run.stdout) < 16 * tokens * 128


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_chip_has_room_for_gradients(topology):
    """Of more queries than wait at a time: those of keys and values are float32, twice."""
    backwards = KERNEL.replace("jax.jit(attend)", "jax.jit(lambda *qkv: jax.vjp(attend, *qkv)[1](qkv[0]))")
    run = python(backwards.replace("dense_attention", "attention_gradients").format(topology=topology, tokens=75600))
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) < 32 * 75600 * 128


def test_neighbouring_slices_exchange_only_where_their_windows_overlap(tmp_path):
    """Eight windows over two slices: one device of each has a neighbour in the other."""
    fields = ("--topology", "v5e:2x2", "--slices", "2", "--mesh", "8", "1", "1", "1")
    report = compile_step(*fields, out=tmp_path / "report.json")
    assert report["devices"] == 8
    assert report["program_to_expected"] == pytest.approx(1, abs=0.05)
    assert set(report["sent"]) == {"collective-permute"}
    assert 0 < report["sent_between_slices"] <= report["sent"]["collective-permute"]


MESH = """
from kavatar_jax.parallel.mesh import make_mesh
from tools.benchmarks.absent import absent_devices
print(make_mesh(*{sizes}, devices=absent_devices("{topology}")).devices.shape)
"""


@pytest.mark.parametrize(("topology", "sizes"), [("v6e:4x4", (2, 2, 2, 2)), ("v5p:4x4x4", (2, 8, 2, 2))])
def test_a_mesh_may_cut_an_axis_of_the_torus_in_two(topology, sizes):
    run = python(MESH.format(topology=topology, sizes=sizes))
    assert run.stdout.strip() == str(sizes), run.stderr[-3000:]


SLICES = """
import numpy as np
from kavatar_jax.parallel.mesh import make_mesh
from tools.benchmarks.absent import absent_devices
devices = absent_devices("v5e:4x4", slices=2)
mesh = make_mesh(*{sizes}, devices=devices[::-1])
print(np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(2, -1).tolist())
"""


def test_slices_divide_data_among_them():
    run = python(SLICES.format(sizes=(2, 8, 2, 1)))
    assert run.stdout.strip() == str([[0] * 16, [1] * 16]), run.stderr[-3000:]


def test_an_axis_that_slices_cannot_divide_is_refused():
    run = python(SLICES.format(sizes=(1, 16, 2, 1)))
    assert "ValueError: a mesh of data 1 cannot be divided among 2 slices" in run.stderr


PRODUCT = """
import jax, jax.numpy as jnp
from kavatar_jax.nn.quantised import quantised_matmul
from kavatar_jax.parallel.mesh import make_mesh
from tools.benchmarks.absent import absent_devices
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
    run = python(PRODUCT.format(topology=topology, form=form))
    assert run.returncode == 0, run.stderr[-3000:]
    operations = {name: kind for name, kind in re.findall(r"%([\w.\-]+) = (\w+)\[", run.stdout)}
    [product] = re.findall(r"%([\w.\-]+) = .* convolution\(%([\w.\-]+), %([\w.\-]+)\)", run.stdout)
    operands = "s8" if form == "int8" else "f8e4m3fn"
    assert [operations[name] for name in product] == [total, operands, operands]


def test_a_slice_that_does_not_exist_is_refused():
    run = start("--topology", "v5e:3x3")
    assert run.returncode == 2
    assert "v5e:3x3" in run.stderr and "Traceback" not in run.stderr


def compile_step(*arguments: str, out: Path, **kind) -> dict:
    run = start(*arguments, "--json", str(out), **kind)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(out.read_text())


def python(text: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=600)


def start(*arguments: str, config: str = "stableavatar", fields: Sequence[str] = FIELDS) -> subprocess.CompletedProcess:
    changes = [word for field in fields for word in ("--set", field)]
    command = [sys.executable, "-m", "tools.bench", "aot", "--config", config, *changes, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
