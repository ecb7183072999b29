"""Devices that are not there, to trace and compile for: TPU slices by libtpu, H100s by the CUDA plug-in of JAX.

Neither needs its hardware. libtpu knows its chips; a GPU is described to the compiler by figures that are published.
"""

import os

from jax.experimental import topologies

from tools.benchmarks.roofline import CHIPS

# no look-up of the cloud machine this is not, and no lock against another process that compiles
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
HOST = 8  # most GPUs of one host, which NVLink joins
# XLA's GpuTargetConfigProto of an H100 SXM: NVIDIA's H100 white paper (132 multiprocessors of 128 lanes, 1.98 GHz, 50 MiB of
# cache) and the table of compute capability 9.0 in the CUDA C++ programming guide
H100 = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""
INSTALL_TPU = (
    "pip install --no-deps --target DIR libtpu, of the version that jax[tpu] asks for, and put DIR on PYTHONPATH"
)
INSTALL_CUDA = (
    "pip install --no-deps --target DIR jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION nvidia-cudnn-cu12, "
    "VERSION being jax's, and put DIR on PYTHONPATH"
)


def absent_devices(topology: str, slices: int = 1) -> list:
    """The devices of a slice such as "v5e:4x4", of several of them that a slower network joins, or of one to eight GPUs,
    "h100:8". ValueError for what does not exist.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"there are no figures for the chips of {topology!r}; choose one of {', '.join(CHIPS)}")
    if slices < 1 or (slices > 1 and kind == "h100"):
        raise ValueError(f"cannot compile for {slices} slices of {topology!r}; slices are of TPUs, one or more")
    return _gpus(topology, shape or "1") if kind == "h100" else _tpus(topology, slices)


def _tpus(topology: str, slices: int) -> list:
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices).devices
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"cannot compile for {topology!r}: {error}; {INSTALL_TPU}, and try v5e:2x2") from None


def _gpus(topology: str, count: str) -> list:
    if count not in map(str, range(1, HOST + 1)):
        raise ValueError(f"{topology!r} is not the GPUs of one host; write h100 for one, up to h100:{HOST}")
    target = H100.format(bandwidth=CHIPS["h100"].bandwidth, memory=CHIPS["h100"].memory)
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=target, topology=f"1x1x{count}"
        ).devices
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"cannot compile for {topology!r}: {error}; {INSTALL_CUDA}") from None
