"""What chips can do, by their published figures, and the least time that a program's work takes on one of them."""

from typing import NamedTuple

from tools.benchmarks.hlo import Cost


class Chip(NamedTuple):
    """One JAX device. memory: bytes a program may use, as the compiler says where it refuses one; bandwidth: of it, B/s

    links: B/s that leave it over all its links together; tile: side of the matrix unit
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    tile: int


# dense bfloat16. TPUs: cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x: links are half of "interchip interconnect bandwidth",
# which is both ways. A v5p is one device of two cores, a tpu7x two devices, and its memory is half of the chip's, unseen.
# H100 SXM: NVIDIA's data sheet, half of its 1,979 TFLOP/s with sparsity, 80 GB of 3.35 TB/s, half of NVLink's 900 GB/s both
# ways. JAX takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
CHIPS = {
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 200e9, 128),
    "v5p": Chip(459e12, 95.73 * 2**30, 2765e9, 600e9, 128),
    "v6e": Chip(918e12, 31.24 * 2**30, 1640e9, 400e9, 256),
    "tpu7x": Chip(1153.5e12, 96.0 * 2**30, 3690e9, 300e9, 256),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, 64),
}


class Roofline(NamedTuple):
    """Seconds each part takes by itself; time: of the longest, as if the others hid behind it."""

    compute: float
    memory: float
    interconnect: float

    @property
    def time(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        return self._fields[self.index(self.time)]


def roofline(cost: Cost, chip: Chip, *, head: int) -> Roofline:
    """A matrix unit wider than a head is part idle where a kernel contracts over the head: queries by keys."""
    slow = max(1.0, chip.tile / head)
    compute = (cost.flops - cost.contracting + slow * cost.contracting) / chip.flops
    return Roofline(compute, cost.traffic / chip.bandwidth, sum(cost.sent.values()) / chip.links)
