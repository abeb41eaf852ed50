"""Tiles of `hsa_attention` by their size, from their static schedules on TPUs: no TPU needed.

    python -m benchmarks.kernels.schedules.hsa            # a minute on 2 cores
    python -m benchmarks.kernels.schedules.hsa --page     # write the table into docs/kernels.md, compile nothing

8 key heads with 4 query heads each, of width 128 in bfloat16, read 8 of 128 chunks of 64 tokens for each of 4,096
queries: on average 256 pairs of a query and a chunk, or 1,024 rows, a chunk. Compiled for the chip for tiles of several
sizes; a TPU executes one bundle a cycle but for stalls (`tpu_bundles.py`). A tile's bundles are all of a step of the
grid but what only the first or the last tile of a head or of a chunk does, with its loops over pairs as often as they
turn in a full tile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import aot, tables
from benchmarks.kernels.schedules import schedule_listing
from benchmarks.reporting import RESULTS, report, table

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
ROWS = (128, 256, 512, 1024)
QUERIES, HEADS, GROUP, CHOICES, CHUNKS, SLOTS, WIDTH = 4096, 8, 4, 8, 128, 64, 128
KERNELS = {"hsa_forward": 2, "hsa_backward": 3}  # regions that not all tiles enter
PAGE = aot.ROOT / "docs" / "kernels.md"
_INNER = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:LH|LB|LE|PB|PF|CT)?\s*: >>")


def bundles(listing: Path, once: int, turns: int) -> int:
    """Of a full tile; `once` regions are the first ones and the last one, `turns` is how often its loops turn.

    Raises:
      ValueError: the schedule does not have these regions and loops.
    """
    loop = schedule_listing.read(listing)
    rare = [*loop.regions[: once - 1], loop.regions[-1]]
    inner = [int(m.group(1), 16) for m in map(_INNER.match, listing.read_text().splitlines()) if m]
    inner = [at for at in inner if not any(region.start <= at < region.stop for region in rare)]
    if len(loop.regions) < once or any(region.products for region in rare) or not inner:
        raise ValueError(f"{listing}: {len(loop.regions)} regions and {len(inner)} bundles in loops")
    always = loop.always + sum(region.size for region in loop.regions) - sum(region.size for region in rare)
    return always + (turns - 1) * len(inner)


def measure(chip: str, rows: int) -> list[dict[str, Any]]:
    """A line for each kernel, compiled in a process of its own.

    Raises:
      RuntimeError: the compiler refused it.
    """
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
        environment = aot.child_environment(CHIPS[chip]) | {"LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, "-m", "benchmarks.kernels.schedules.hsa", "--child", chip, str(rows)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{chip}, {rows} rows: {done.stderr.strip().splitlines()[-1]}")
        for kernel, once in KERNELS.items():
            (listing,) = schedule_listing.listings(Path(folder), kernel)
            found = bundles(listing, once, rows // GROUP // 8)
            name = kernel.removeprefix("hsa_")
            lines.append({
                "chip": chip, "kernel": name, "rows": rows, "bundles a tile": found, "a pair": found * GROUP / rows,
            })  # fmt: skip
    return lines


def _child(chip: str, rows: int) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels.choice_tiles import most_tiles
    from pallas_kernels.tpu import hsa_kernels

    place = SingleDeviceSharding(aot.devices(CHIPS[chip])[0])

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    block = rows // GROUP
    tiles = most_tiles(QUERIES * CHOICES, CHUNKS, block)
    work = hsa_kernels.Work(
        array(HEADS * tiles, dtype=jnp.int32),
        array(HEADS, dtype=jnp.int32),
        array(HEADS, tiles, 1, block + 1, dtype=jnp.int32),
        array(HEADS, tiles, 1, rows),
    )
    q, chunks = array(HEADS, QUERIES + 1, GROUP, WIDTH), (HEADS, CHUNKS, SLOTS, WIDTH)
    k, d_k, scale = array(*chunks, dtype=jnp.bfloat16), array(*chunks), WIDTH**-0.5

    def forward(*arrays: Any) -> Any:
        return hsa_kernels.forward(scale, *arrays, False)

    def backward(*arrays: Any) -> Any:
        return hsa_kernels.backward(scale, *arrays, False)

    for kernel, arrays in ((forward, (work, q, k, k)), (backward, (work, q, q, k, k, d_k, d_k))):
        jax.jit(kernel).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--page", action="store_true", help="write the table into docs/kernels.md, compile nothing")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments.child[0], int(arguments.child[1]))
    elif arguments.page:
        tables.put(
            PAGE,
            "kernels/schedules/hsa",
            table(json.loads((RESULTS / "kernels/schedules/hsa.json").read_text())["rows"]),
        )
    else:
        report(
            "kernels/schedules/hsa", [line for chip in arguments.chips for rows in ROWS for line in measure(chip, rows)]
        )


if __name__ == "__main__":
    main()
