"""Programs compile for H100s that are not there, with cuDNN's attention, do the work expected and fit the memory.

Needs the CUDA plug-in of JAX and cuDNN's library, but no GPU (docs/performance.md).
"""

import subprocess
import sys

import pytest
from test_aot import ROOT, compile_step, start

H100_BYTES = 80e9


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("jax_cuda12_plugin", reason="compiling for an H100 needs JAX's CUDA plug-in")
    pytest.importorskip("nvidia.cudnn", reason="compiling attention for an H100 needs cuDNN's library")


@pytest.mark.parametrize(("topology", "mesh"), [("h100", "1 1 1 1"), ("h100:4", "2 1 2 1")])
def test_a_sampling_step_compiles_for_h100s(topology, mesh, tmp_path):
    report = compile_step("--topology", topology, "--mesh", *mesh.split(), out=tmp_path / "report.json")
    print(f"peak {report['peak_bytes'] / 2**20:.1f} MiB per GPU, sent {report['sent']}")
    # self-attention, and cross-attention to the words and to the portrait, in both layers
    assert report["kernels"] == 6
    assert report["fits"] and 0 < report["argument_bytes"] < report["peak_bytes"] < H100_BYTES
    assert report["program_to_expected"] == pytest.approx(1, abs=0.05)
    if topology == "h100:4":  # heads for tokens in self-attention
        assert report["sent"]["all-to-all"] > 0
    else:
        assert not report["sent"]


GRADIENTS = """
import jax, jax.numpy as jnp
from kavatar_jax.nn.attention import attend
from kavatar_jax.parallel.mesh import make_mesh
from tools.benchmarks.absent import absent_devices
with jax.set_mesh(make_mesh(1, devices=absent_devices("h100"))):
    q, k = (jax.ShapeDtypeStruct((1, tokens, 2, 128), jnp.bfloat16) for tokens in (1560, {keys}))
    gradients = jax.jit(jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
    program = gradients.trace(q, k, k).lower(lowering_platforms=("cuda",)).compile()
print(program.as_text())
"""


@pytest.mark.parametrize(("keys", "kernel"), [(512, True), (257, False)])
def test_attention_to_words_and_to_a_portrait_has_gradients(keys, kernel):
    """A portrait's 257 tokens are odd, and JAX gives cuDNN's kernel gradients for even numbers only."""
    command = [sys.executable, "-c", GRADIENTS.format(keys=keys)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert ("__cudnn$fmhaSoftmaxBackward" in run.stdout) == kernel


def test_more_gpus_than_a_host_has_are_refused():
    run = start("--topology", "h100:9")
    assert run.returncode == 2
    assert "h100:9" in run.stderr and "Traceback" not in run.stderr
