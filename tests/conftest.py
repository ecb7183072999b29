"""Eight CPU devices, float32 products in full, and the folder of real inputs where it is at hand."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
# most of the time goes into compiling: a second run finds its programs here
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "programs"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Lets go of a module's compiled programs. Each takes memory maps, and a process that has 65,530 of them dies."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules that are nearly all compilation: little is optimised, also where the run as a whole does optimise."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def data() -> Path:
    """Real portraits and recordings; tests that want them are skipped, visibly, where they are not."""
    folder = Path(os.environ.get("KAVATAR_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder of real inputs at {folder}; set KAVATAR_DATA")
    return folder
