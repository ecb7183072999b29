"""The one mesh of a run, always present, even on one device; and which platform a computation is traced for."""

import math

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """A mesh of all devices, laid out by JAX for the topology at hand; one size may be -1 and takes what is left.

    Sizes may cut an axis of the chips' own torus in two, where no others fit, which jax.make_mesh allows on few chips.
    Several slices of TPUs, joined by a slower network, divide `data` among them. ValueError for what cannot be laid out.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, context, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // max(1, math.prod(s for s in sizes if s != -1))
    if math.prod(sizes) != len(devices):
        axes = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
        raise ValueError(f"a mesh of {axes} needs {math.prod(sizes)} devices and there are {len(devices)}")
    return Mesh(_lay_out(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _lay_out(sizes: list[int], devices) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    data, *others = sizes
    if data % slices:
        raise ValueError(
            f"a mesh of data {data} cannot be divided among {slices} slices; make it a multiple of {slices}"
        )
    within, among = (data // slices, *others), (slices, 1, 1, 1)
    return create_hybrid_device_mesh(within, among, devices, allow_split_physical_axes=True)


def picture_mesh(mesh: Mesh, height: int, width: int) -> Mesh:
    """The same devices in the same order, for one video: `data` cuts the height of its pictures and `context` their width.

    height, width: in pixels. The largest part, with the border that its convolutions look at, is as small as can be; for
    TPUs, of those cuts that leave little to fill up at half the size, where they work as much as at the whole.
    """
    tpu = mesh.devices.flat[0].platform == "tpu"

    def rank(rows: int) -> tuple[bool, int]:
        columns = mesh.size // rows
        part = (math.ceil(height / rows) + 2) * (math.ceil(width / columns) + 2)
        return tpu and _wasteful(height // 2, width // 2, rows, columns), part

    rows = min((rows for rows in range(1, mesh.size + 1) if mesh.size % rows == 0), key=rank)
    return Mesh(mesh.devices.reshape(rows, 1, -1, 1), AXES, axis_types=mesh.axis_types)


def _wasteful(height: int, width: int, rows: int, columns: int) -> bool:
    """Whether a TPU works on a twentieth more than there is, or worse, because of how pictures of this size are cut.

    Its compiler deals a part's columns, with the border, into a convolution's batch of eight, and fills up the last.
    """
    dealt = 8 * math.ceil((math.ceil(width / columns) + 2) / 8)
    return 20 * rows * columns * math.ceil(height / rows) * dealt >= 21 * height * width


def platform() -> str:
    """The platform code is traced for: the entered mesh's, so that it is right when compiling for absent hardware."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def device_kind() -> str:
    """The name of the device code is traced for, as "TPU v5 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def current() -> Mesh:
    """The entered mesh, or one of a single device if none is."""
    mesh = jax.sharding.get_mesh()
    return make_mesh(1, devices=jax.devices()[:1]) if mesh.empty else mesh


def wait_for_processes(name: str) -> None:
    """Until every process of the run is here, for up to a week. Who left before would be taken for dead, and end the others.

    Not a collective over the devices: on a CPU one gives up after 30 seconds.
    """
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=name, timeout_ms=7 * 24 * 3600 * 1000)
