"""Compile programs for TPUs and GPUs that are not there: ahead of time, on any CPU, with the real compilers.

    pip install --target .venv/aot libtpu                                        # what `make test` does
    pip install --no-deps --target .venv/aot-gpu jax-cuda13-plugin jax-cuda13-pjrt      # `make aot-compilers` does both

The compilers lie in folders of their own because JAX takes a machine on which it can import libtpu for a TPU host. So a
compile runs in a fresh process whose environment is `child_environment(topology)`; there `devices` gives the chips and
`tpu_mesh` a mesh of them. An H100 is described by `h100.txtpb`, the properties that its driver reports.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from streamjax.parallel.mesh import make_mesh


class Target(NamedTuple):
    """Chips to compile for: `memory_bytes` is what a program may use of one chip's memory."""

    platform: str  # "tpu" or "cuda"
    memory_bytes: int
    accelerator: str = ""  # the type that libtpu wants to hear


# TPUs by the topology's name. Memory: 16, 95 and 32 GiB, of which the compiler keeps some of a v6e's for itself; of an
# H100's 80 GB, what the driver leaves.
TOPOLOGIES = {
    "v5e:1x1": Target("tpu", 16 * 2**30, "v5litepod-1"),
    "v5e:2x4": Target("tpu", 16 * 2**30, "v5litepod-8"),
    "v5p:2x2x1": Target("tpu", 95 * 2**30, "v5p-8"),
    "v5p:4x4x4": Target("tpu", 95 * 2**30, "v5p-128"),
    "v5p:4x8x8": Target("tpu", 95 * 2**30, "v5p-512"),
    "v6e:1x1": Target("tpu", int(31.24 * 2**30), "v6e-1"),
    "v6e:8x8": Target("tpu", int(31.24 * 2**30), "v6e-64"),
    "v6e:16x16": Target("tpu", int(31.24 * 2**30), "v6e-256"),
    "h100": Target("cuda", 84_942_979_072),
}
ROOT = Path(__file__).resolve().parent.parent
H100 = Path(__file__).with_name("h100.txtpb")
LIBRARIES = {"tpu": Path(sys.prefix) / "aot", "cuda": Path(sys.prefix) / "aot-gpu"}
_PACKAGES = {"tpu": "libtpu", "cuda": f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"}
_MARKS = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}


def available(platform: str = "tpu") -> bool:
    """Whether the compiler of a platform is installed where `child_environment` looks for it."""
    return (LIBRARIES[platform] / _MARKS[platform]).exists()


def child_environment(topology: str) -> dict[str, str]:
    """The environment of a process that compiles for `topology`.

    Raises:
      ValueError: an unknown topology, or its compiler is not installed.
    """
    if topology not in TOPOLOGIES:
        raise ValueError(f"unknown topology {topology!r}; known: {', '.join(TOPOLOGIES)}")
    platform, _, accelerator = TOPOLOGIES[topology]
    library = LIBRARIES[platform]
    if not available(platform):
        install = f"{sys.executable} -m pip install --no-deps --target {library} {_PACKAGES[platform]}"
        raise ValueError(f"no compiler for {topology} in {library}: run `{install}` (or `make aot-compilers`)")
    path = os.pathsep.join(filter(None, [str(ROOT), str(library), os.environ.get("PYTHONPATH", "")]))
    return {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it takes no chip, so several may compile at once
        "TPU_ACCELERATOR_TYPE": accelerator,
    }


def devices(topology: str) -> Sequence[jax.Device]:
    """The chips of `topology`, which exist for the compiler only; for a process of `child_environment`."""
    if TOPOLOGIES[topology].platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    jax.devices()  # registers the plugin; the platform stays the CPU
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100.read_text()).devices


def tpu_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh of the chips of `topology`; for a process of `child_environment`."""
    return make_mesh(**axes, devices=devices(topology))


def bytes_per_device(tree: object) -> int:
    """Bytes that the arrays of a tree of placed `jax.ShapeDtypeStruct`s take on one device, without padding."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


# What the compiler writes once every buffer of a program has its place, before it makes the code of a single kernel.
ASSIGNED, _REPORT = "*.after_optimizations_after_buffer_assignment.txt", "*.after_optimizations-memory-usage-report.txt"
_BUFFERS = "*.after_optimizations-buffer-assignment.txt"
DUMP = "AOT_DUMP"  # the environment variable with the folder for it


def compile_until_assigned(lowered: jax.stages.Lowered, options: Mapping[str, str] | None = None) -> None:
    """Compile a program, its schedule and buffers written into the folder of `DUMP` on the way.

    Making code takes most of a compile's time and tells nothing about either: whoever waits for the files may end this
    process as soon as they are there.
    """
    lowered.compile(compiler_options={**(options or {}), "xla_dump_to": os.environ[DUMP], "xla_dump_hlo_as_text": True})


def compiled_with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """A program compiled for a TPU, and its text as the compiler writes it, with what it estimates.

    `compiled.as_text()` is the same where JAX can read the program; it refuses asynchronous instructions of several
    operands, which the compiler makes for a v5p.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        written = max(Path(folder).glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
        return compiled, written.read_text()


class Assigned(NamedTuple):
    """What a process had to say that was ended once the compiler had placed its buffers.

    found: `read_assigned` of its program; None where the process ended before, of which `errors` tell. printed: lines.
    """

    found: tuple[str, dict[str, int]] | None
    printed: list[str]
    errors: str


_WANTED = re.compile(r"(HLO temporaries \(|Used )([\d.]+)([KMGT])")


def wanted_bytes(message: str, held: int = 0) -> int | None:
    """What a program wants that is larger than the chip's memory, from what the compiler says; None: it says nothing.

    Some versions leave out the arguments, of which `held` bytes are known.
    """
    found = _WANTED.search(message)
    if found is None:
        return None
    size = int(float(found[2]) * 1024 ** (1 + "KMGT".index(found[3])))
    return size if found[1].startswith("Used") else held + size


def end_when_assigned(command: Sequence[str], environment: Mapping[str, str], text: str = "") -> Assigned:
    """Run a process that calls `compile_until_assigned`, and end it when the files are there.

    Args:
      command: of the process.
      environment: its environment.
      text: what it reads.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, dump = Path(name), Path(name) / "dump"
        (folder / "text").write_text(text)
        with (folder / "text").open() as read, (folder / "said").open("w") as said, (folder / "bad").open("w") as bad:
            known = {**environment, DUMP: str(dump)}
            child = subprocess.Popen(command, cwd=ROOT, env=known, stdin=read, stdout=said, stderr=bad, text=True)
        while child.poll() is None and not any(dump.glob(ASSIGNED)):
            time.sleep(1.0)
        time.sleep(2.0)  # until the file is whole
        child.kill()
        child.wait()
        found = read_assigned(dump) if any(dump.glob(ASSIGNED)) else None
        return Assigned(found, (folder / "said").read_text().splitlines(), (folder / "bad").read_text())


def read_assigned(folder: Path) -> tuple[str, dict[str, int]]:
    """The scheduled program, and bytes of each memory: "default" is the chip's main memory, arguments included.

    The compiler's report also counts what is inside of fusions, which takes no memory ("thread-local"): left out here.
    """
    text, report, buffers = (
        max(folder.glob(name), key=lambda path: path.stat().st_size).read_text()
        for name in (ASSIGNED, _REPORT, _BUFFERS)
    )
    spaces = re.findall(r"^Memory Space: (\w+).*\nTotal bytes: (\d+)", report, flags=re.M)
    found = {name: int(size) for name, size in spaces}
    inside = re.findall(r"^allocation \d+: size (\d+), page \d+, thread-local", buffers, flags=re.M)
    return text, found | {"default": found["default"] - sum(map(int, inside))}


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
