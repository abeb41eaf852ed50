"""What a Hopper GPU's compiled kernels take, by NVIDIA's tools: registers, spills, and the cost of inner loops.

An H100's multiprocessor has four parts, each of which starts one instruction a cycle for one of its warps. Its tensor
cores make 4,096 operations a cycle, 989 TFLOP/s at 1,830 MHz on 132 of them: `wgmma` of 64 x N x 16 takes N / 2 cycles
of all four. Its special-function unit, which makes exponentials, takes 8 cycles a warp (16 results a cycle: CUDA C++
Programming Guide, arithmetic instructions, compute capability 9.0). With two warps in turn on each part, as our
kernels have, neither the instructions nor the exponentials of a warp may take longer than its products if the tensor
cores are to be the bound.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import aot

KERNELS = "((?:flash|decode|paged|pool|shared_pool|hsa|page|token|recurrence|delta)_[a-z]+(?:_[a-z]+)?)"
SPECIAL_CYCLES = 8
_ENTRY = rf"{KERNELS}(?:_mosaic_gpu_kernel)?"
_LAUNCH = re.compile(rf"\b{KERNELS} grid: .*? threads: \[(\d+), .*?shared_memory: (\d+) bytes")
_SPILLS = r"(\d+) bytes spill stores, (\d+) bytes spill loads"
_PTXAS = re.compile(rf"for {_ENTRY}\n.*?{_SPILLS}\n.*?Used (\d+) registers")
_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_LOOP = re.compile(r"/\*[0-9a-f]{4,}\*/\s+@!?U?P\w+\s+BRA\S*\s.*?(\.L_\w+)")  # forwards ones are not taken up
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x(\d+)")


class Loop(NamedTuple):
    """One pass of an inner loop, of one warp: instructions, and cycles of the tensor cores and of exponentials."""

    instructions: int
    tensor: int
    special: int


def figures(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each kernel in XLA's and Mosaic's dumps, how it is launched and what the tools that there are make of it."""
    found: dict[str, dict[str, Any]] = {}
    for path in folder.glob("*thunk_sequence.txt"):
        for name, threads, shared in _LAUNCH.findall(path.read_text()):
            found[name] = {"threads": int(threads), "shared": int(shared)}
    assembler, disassembler = tool("ptxas"), tool("nvdisasm")
    for path in folder.glob("*.ptx") if assembler else []:
        if not re.search(rf"\.entry {_ENTRY}\(", path.read_text()):
            continue
        binary = path.with_suffix(".cubin")
        said = _run(assembler, "-v", "-arch=sm_90a", str(path), "-o", str(binary)).stderr
        for name, stored, loaded, registers in _PTXAS.findall(said):
            found.setdefault(name, {}).update(registers=int(registers), spills=int(stored) + int(loaded))
        if disassembler:
            for name, each in loops(_run(disassembler, "-c", str(binary)).stdout).items():
                kernel = re.fullmatch(_ENTRY, name)
                if kernel and each:
                    best = min(each, key=lambda loop: loop.instructions / loop.tensor)
                    found.setdefault(kernel[1], {})["loop"] = best._asdict()
    return found


@cache
def tool(name: str) -> Path | None:
    """A program of NVIDIA's: the one that `make aot-compilers` installs, else the machine's, else none."""
    installed = next(iter(sorted(aot.LIBRARIES["cuda"].glob(f"nvidia/*/bin/{name}"))), None)
    if installed is not None:
        installed.chmod(0o755)  # pip's `--target` forgets that it is a program
        return installed
    machine = shutil.which(name)
    return Path(machine) if machine else None


def versions() -> list[str]:
    """What the tools say of themselves."""
    return [_run(found, "--version").stdout for name in ("ptxas", "nvdisasm") if (found := tool(name))]


def _run(program: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True)


def loops(sass: str) -> dict[str, list[Loop]]:
    """Of each kernel, its innermost loops that multiply matrices, in order."""
    found: dict[str, list[Loop]] = {}
    for name, lines in _kernels(sass):
        labels: dict[str, int] = {}
        code: list[str] = []
        edges: list[tuple[int, int]] = []
        for line in lines:
            if label := _LABEL.match(line):
                labels[label[1]] = len(code)
            if (back := _LOOP.search(line)) and back[1] in labels:
                edges.append((labels[back[1]], len(code)))
            if instruction := _INSTRUCTION.search(line):
                code.append(instruction[1])
        bodies = [(first, last) for first, last in set(edges) if any("HGMMA" in x for x in code[first : last + 1])]
        inner = [x for x in bodies if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in bodies)]
        found[name] = [_cost(code[first : last + 1]) for first, last in sorted(inner)]
    return found


def _kernels(sass: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in sass.splitlines():
        if section := _SECTION.match(line):
            if name:
                yield name, lines
            name, lines = section[1], []
        lines.append(line)
    if name:
        yield name, lines


def _cost(code: list[str]) -> Loop:
    products = [_PRODUCT.match(x) for x in code]
    tensor = sum(int(x[1]) * int(x[2]) // 32 for x in products if x)
    return Loop(len(code), tensor, SPECIAL_CYCLES * sum(x.startswith("MUFU") for x in code))
