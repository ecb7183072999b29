"""The sampling step compiles for TPUs that are not there, with the kernel that TPUs are for, and fits their memory.

Needs libtpu (the extra `aot`). It is asked in a process of its own, because it must find its environment when it is loaded.
"""

import json
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
    print(f"peak {report['peak_bytes'] / 2**20:.1f} MiB per chip, collectives {report['collectives']}")
    # self-attention, and cross-attention to the words and to the portrait
    assert report["kernels"] == 3
    assert 0 < report["argument_bytes"] < report["peak_bytes"] < V5E_BYTES
    if mesh == "4 1 1 1":  # whole networks on every chip: only the fusion of neighbouring windows communicates
        assert {name for name, count in report["collectives"].items() if count} == {"collective-permute"}


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
