"""Compile programs for TPUs that are not there: ahead of time, on any CPU, with the real TPU compiler.

    pip install --target .venv/aot libtpu        # what `make test` does

`libtpu` lies in a folder of its own because JAX takes a machine on which it can import it for a TPU host. So a compile
runs in a fresh process whose environment is `child_environment(topology)`; there `tpu_mesh` gives a mesh of the chips.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from streamjax.parallel.mesh import make_mesh

# Chips by the topology's name, the accelerator type that libtpu wants to hear, and bytes of memory of one chip.
TOPOLOGIES = {
    "v5e:2x4": ("v5litepod-8", 16 * 2**30),
    "v5p:2x2x1": ("v5p-8", 95 * 2**30),
}
ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(sys.prefix) / "aot"
INSTALL = f"no libtpu in {LIBRARY}: run `{sys.executable} -m pip install --target {LIBRARY} libtpu` (`make test` does)"


def available() -> bool:
    """Whether the TPU compiler is installed where `child_environment` looks for it."""
    return (LIBRARY / "libtpu").exists()


def child_environment(topology: str) -> dict[str, str]:
    """The environment of a process that compiles for `topology`.

    Raises:
      ValueError: an unknown topology, or no libtpu.
    """
    if topology not in TOPOLOGIES:
        raise ValueError(f"unknown topology {topology!r}; known: {', '.join(TOPOLOGIES)}")
    if not available():
        raise ValueError(INSTALL)
    path = os.pathsep.join(filter(None, [str(ROOT), str(LIBRARY), os.environ.get("PYTHONPATH", "")]))
    return {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it takes no chip, so several may compile at once
        "TPU_ACCELERATOR_TYPE": TOPOLOGIES[topology][0],
    }


def tpu_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh of the chips of `topology`, which exist for the compiler only; for a process of `child_environment`."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return make_mesh(**axes, devices=chips)


def bytes_per_device(tree: object) -> int:
    """Bytes that the arrays of a tree of placed `jax.ShapeDtypeStruct`s take on one device, without padding."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


_SIZES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
_COPY = re.compile(r"= \(?(\w+)\[([\d,]*)\](\{[^}]*\})?.*? copy(-start)?\(")
_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")


def copied_bytes(text: str, at_least: int = 2**20) -> int:
    """Bytes that a compiled TPU program copies into main memory, by copies of `at_least` bytes each.

    Copies into a chip's fast memory (`S(1)`) are prefetches and do not count, nor do copies inside a fusion, which
    write nothing. A copy in a loop counts once.
    """
    fused = set(re.findall(r"calls=(%[\w.\-]+)", text))
    total, skip = 0, False
    for line in text.splitlines():
        if line and not line[0].isspace():
            skip = line.split(" ", 1)[0] in fused
        match = None if skip else _COPY.search(line)
        if match and match.group(1) in _SIZES and "S(" not in (match.group(3) or ""):
            size = _SIZES[match.group(1)] * math.prod(int(width) for width in match.group(2).split(",") if width)
            total += size if size >= at_least else 0
    return total


def collectives(text: str) -> dict[str, int]:
    """How often each collective, `operation type[shape]` of its result, stands in a compiled program."""
    found = (f"{match.group(2)} {re.sub(r'{.*?}', '', match.group(1))}" for match in _COLLECTIVE.finditer(text))
    return dict(Counter(found))
