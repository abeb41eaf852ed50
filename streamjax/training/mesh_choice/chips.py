"""What a device can do, by its published figures: as much as a choice between meshes needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from streamjax.field_checks import Positive, Size, check_fields


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device and its links.

    Attributes:
      flops: bfloat16 operations in a second.
      memory_bytes: what a program may use.
      memory_bandwidth: bytes that it reads of its memory in a second.
      link: bytes in a second and direction, of one link of a torus, or of all links of a device to its neighbours.
      torus: dimensions of the torus that devices lie in, each with a link in both directions; None where devices are
        switched.
      near: devices that are switched together, where they are.
      far: bytes in a second from devices farther away.
      host_bytes: a device's share of its host's memory.
    """

    flops: Positive
    memory_bytes: Size | int
    memory_bandwidth: Positive
    link: Positive
    torus: Size | None = None
    near: Size = 8
    far: Positive = 5e10
    host_bytes: Positive = 1e11

    def __post_init__(self) -> None:
        check_fields(self)

    def bandwidth(self, size: int, inner: int, devices: int) -> float:
        """Bytes that a device receives in a second from the others along a mesh axis.

        Args:
          size: devices along the axis.
          inner: devices along all axes behind it, which are nearer to each other.
          devices: of the whole mesh.

        In a torus an axis spans a share of the dimensions, as its size says: 16 of 64 devices two of three. Each
        dimension brings bytes from both sides.
        """
        if self.torus is None:
            return self.link if size * inner <= self.near else self.far
        spanned = self.torus * math.log(size) / math.log(devices) if devices > 1 else 1.0
        return 2 * self.link * spanned


# Per chip: Google's and NVIDIA's data sheets; of an H100's and an A100's far devices a network card of 400 and 200
# Gbit/s for each. A CPU stands for the virtual devices of one machine.
CHIPS: Mapping[str, Chip] = {
    "TPU v4": Chip(2.75e14, 32 * 2**30, 1.2e12, 4.5e10, torus=3),
    "TPU v5 lite": Chip(1.97e14, 16 * 2**30, 8.1e11, 4.5e10, torus=2),
    "TPU v5": Chip(4.59e14, 95 * 2**30, 2.77e12, 9e10, torus=3),
    "TPU v6 lite": Chip(9.18e14, int(31.24 * 2**30), 1.64e12, 9e10, torus=2),
    "NVIDIA A100": Chip(3.12e14, 80 * 2**30, 2.0e12, 3e11, far=2.5e10),
    "NVIDIA H100": Chip(9.89e14, 80 * 2**30, 3.35e12, 4.5e11),
    "NVIDIA H200": Chip(9.89e14, 141 * 10**9, 4.8e12, 4.5e11),
    "cpu": Chip(5e10, 16 * 2**30, 1e10, 1e10, near=2**31 - 1),
}
_OTHER_NAMES = {"TPU v5p": "TPU v5", "TPU v5e": "TPU v5 lite", "TPU v6e": "TPU v6 lite"}


def chip_of(device_kind: str) -> Chip:
    """The figures of a device by `jax.Device.device_kind`, or by a TPU's short name.

    Raises:
      ValueError: a kind that the table does not have.
    """
    name = _OTHER_NAMES.get(device_kind, device_kind)
    found = next((chip for known, chip in CHIPS.items() if name == known), None)
    if found is None:  # "NVIDIA H100 80GB HBM3"
        found = next(
            (chip for known, chip in CHIPS.items() if known.startswith("NVIDIA") and name.startswith(known)), None
        )
    if found is None:
        raise ValueError(
            f'mesh "auto" knows nothing of {device_kind!r}, only of {", ".join(CHIPS)}: set sizes of the mesh, such as '
            "config.mesh.fsdp=-1"
        )
    return found
