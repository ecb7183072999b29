"""The table of compiled programs, also of those whose compiler is newer than the library that reads them."""

import json
from types import SimpleNamespace

import jax
import pytest

from tools import aot_table
from tools.benchmarks import aot


def compiled(text):
    """A program of one product of 128 x 256 x 512, whose compiler says it needs 3 GiB at most, and 5 of the host's."""

    def as_text():
        if text is None:
            raise jax.errors.JaxRuntimeError("INTERNAL: an instruction nobody knows\nat some place")
        return text

    memory = SimpleNamespace(
        peak_memory_in_bytes=8 * 2**30, argument_size_in_bytes=2**30, temp_size_in_bytes=2 * 2**30,
        host_argument_size_in_bytes=5 * 2**30,
    )  # fmt: skip
    return SimpleNamespace(memory_analysis=lambda: memory, as_text=as_text)


PRODUCT = """HloModule step
ENTRY %main (a: f32[128,256], b: f32[256,512]) -> f32[128,512] {
  %a = f32[128,256] parameter(0)
  %b = f32[256,512] parameter(1)
  ROOT %dot = f32[128,512] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


@pytest.mark.parametrize("text, told", [(PRODUCT, "1.000"), (None, "not read")])
def test_a_line_has_what_could_be_read(text, told, tmp_path):
    flops = 2 * 128 * 256 * 512
    program = SimpleNamespace(flops=flops, program=flops, kept=12 * 2**30)
    report = {"mesh": {"data": 16, "fsdp": 1}, "compile_seconds": 30.0}
    report |= aot._examine(compiled(text), program, "v5e", 128, 1)
    assert report["fits"] and report["peak_bytes"] == 3 * 2**30  # and 12 are kept, of 15.75
    program.kept = 13 * 2**30
    assert not aot._examine(compiled(text), program, "v5e", 128, 1)["fits"]
    cell = aot_table.Cell("denoise", "1.3B", "480p", "v5e-16")
    (tmp_path / f"{cell.name}.json").write_text(json.dumps(report))
    head, rule, line = aot_table.rows(tmp_path, [cell])
    assert head.count("|") == rule.count("|") == line.count("|")
    assert "| data 16 | 1.00 | 3.00 | 15.75 |" in line and told in line


def test_what_does_not_fit_says_so(tmp_path):
    cell = aot_table.Cell("train", "14B", "480p", "v5e-16")
    report = {"mesh": {"fsdp": 16}, "fits": False, "needs": "Used 20.00G of 15.75G hbm"}
    (tmp_path / f"{cell.name}.json").write_text(json.dumps(report))
    assert aot_table.rows(tmp_path, [cell])[-1].endswith("does not fit: Used 20.00G of 15.75G hbm |")


@pytest.mark.parametrize(
    "said, told",
    [
        ("RESOURCE_EXHAUSTED: Ran out. Used 20.00G of 15.75G hbm. Exceeded hbm by 4.25G.", "Used 20.00G of 15.75G hbm"),
        (
            "RESOURCE_EXHAUSTED: the memory required for HLO temporaries (46.71G) exceeds available HBM (31.24G).",
            "HLO temporaries (46.71G) exceeds available HBM (31.24G)",
        ),
    ],
)
def test_a_compiler_that_refuses_says_how_much_memory_it_wanted(said, told):
    assert aot._refusal(jax.errors.JaxRuntimeError(said)) == told


def test_other_errors_of_a_compiler_are_told_as_they_are():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of scoped vmem")
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        aot._refusal(error)
