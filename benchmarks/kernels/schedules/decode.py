"""Our decoding kernels against JAX's paged attention by their static schedules on a TPU: no TPU needed.

    python -m benchmarks.kernels.schedules.decode            # some minutes on 2 cores
    python -m benchmarks.kernels.schedules.decode --page     # write the table into docs/kernels.md, compile nothing

One token for 8 streams of 8,192 cached tokens, at the heads of Llama-3.1-8B (32 and 8 of width 128), bfloat16.
`paged_attention` of JAX (`jax.experimental.pallas.ops.tpu`) and ours read pages of 64 tokens, ours those that each key
head names; JAX's `ragged_paged_attention` reads pages that hold all heads; our `decode_attention` a contiguous ring. A
TPU executes one bundle a cycle but for stalls (`tpu_bundles.py`). Counted is the loop over blocks of tokens, with the
copies of the next block's pages; not what a head does once. `floor` is how many cycles the bytes of a token and a head
take at the bandwidth that JAX's table of TPUs has, with a cycle from its peak of bfloat16 operations (for a v6e the
table's units and peak do not make a plausible cycle).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import aot, tables
from benchmarks.kernels.schedules import schedule_listing
from benchmarks.reporting import RESULTS, machine, table

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
LIBRARIES = {
    "decode_attention": "decode_attention",
    "paged_attention": "paged_attention",
    "jax paged_attention": "paged_attention",
    "jax ragged_paged_attention": "ragged_paged_attention",
}
BLOCKS = (512, 1024, 2048)
BATCH, HEADS, KEY_HEADS, WIDTH, TOKENS, PAGE_SIZE = 8, 32, 8, 128, 8192, 64
OUTPUT = RESULTS / "kernels/schedules/decode.json"
PAGE = aot.ROOT / "docs" / "kernels.md"


class Case(NamedTuple):
    """One compile: `block` tokens are worked on at once."""

    library: str
    chip: str
    block: int


def measure(case: Case) -> dict[str, Any]:
    """Bundles of a block of tokens and, by token and key head, compiled in a process of its own.

    Raises:
      RuntimeError: the compiler refused it.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
        environment = aot.child_environment(CHIPS[case.chip])
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} {flags}"
        command = [sys.executable, "-m", "benchmarks.kernels.schedules.decode", "--child", *map(str, case)]
        done = subprocess.run(command, env=environment, cwd=aot.ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stderr.strip().splitlines()[-1]}")
        (listing,) = schedule_listing.listings(Path(folder), LIBRARIES[case.library])
        found = bundles(case.library, schedule_listing.innermost(listing))
    heads = KEY_HEADS if "ragged" in case.library else 1
    return {
        "bundles": found,
        "of a token": found / (case.block * heads),
        "floor": json.loads(done.stdout.splitlines()[-1]),
    }


def bundles(library: str, loop: schedule_listing.Loop) -> int:
    """Of a block in the midst of a head.

    Raises:
      ValueError: the schedule does not have the regions that the kernel has.
    """
    if library == "decode_attention":  # what has no products is done once, first or last
        if len(loop.tiles) != 1:
            raise ValueError(f"{library}: {len(loop.tiles)} regions with products")
        return loop.always + loop.tiles[0].size
    if library == "jax paged_attention":  # the next block's place if a head ends here, first copies, start, next copies
        if len(loop.regions) != 4:
            raise ValueError(f"{library}: {len(loop.regions)} regions")
        return loop.always + loop.regions[-1].size
    return loop.always + sum(region.size for region in loop.regions)


def _child(case: Case) -> None:
    """Compile, and print the floor."""
    import jax
    import jax.numpy as jnp
    from jax._src.pallas.mosaic import tpu_info
    from jax.sharding import SingleDeviceSharding

    device = aot.devices(CHIPS[case.chip])[0]
    place, kind = SingleDeviceSharding(device), device.device_kind
    tpu_info.get_device_kind, tpu_info.get_num_device_cores = (
        lambda: kind,
        lambda: 1,
    )  # some kernels ask while they trace

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    function, arrays = (_ours if "jax" not in case.library else _jax)(case, array)
    jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
    chip = tpu_info.get_tpu_info()
    cycles = chip.bf16_ops_per_second / (2 * chip.num_mxus * chip.mxu_column_size**2)
    print(json.dumps(2 * 2 * WIDTH * cycles / chip.mem_bw_bytes_per_second))


def _ours(case: Case, array: Any) -> tuple[Any, tuple[Any, ...]]:
    import jax.numpy as jnp

    from pallas_kernels import api

    known: dict[str, Any] = {"block": case.block, "implementation": "tpu"}

    def decode(q: Any, k: Any, v: Any, count: Any, first: Any) -> Any:
        return api.decode_attention(q, k, v, count, first=first, **known)

    def paged(q: Any, k: Any, v: Any, count: Any, first: Any, pages: Any) -> Any:
        return api.paged_attention(q, k, v, pages, count, page_size=PAGE_SIZE, first=first, **known)

    cache, number = array(BATCH, KEY_HEADS, TOKENS, WIDTH), array(BATCH, dtype=jnp.int32)
    arrays = array(BATCH, 1, HEADS, WIDTH), cache, cache, number, number
    if case.library == "decode_attention":
        return decode, arrays
    return paged, (*arrays, array(BATCH, KEY_HEADS, TOKENS // PAGE_SIZE, dtype=jnp.int32))


def _jax(case: Case, array: Any) -> tuple[Any, tuple[Any, ...]]:
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    pages, together = TOKENS // PAGE_SIZE, case.block // PAGE_SIZE

    def paged(q: Any, k: Any, v: Any, lengths: Any, table: Any) -> Any:
        return paged_attention(q, k, v, lengths, table, pages_per_compute_block=together)

    def ragged(q: Any, pool: Any, lengths: Any, table: Any, starts: Any, rows: Any) -> Any:
        return ragged_paged_attention(
            q, pool, lengths, table, starts, rows, sm_scale=WIDTH**-0.5, num_kv_pages_per_block=together,
            num_queries_per_block=1, vmem_limit_bytes=2**26,
        )  # fmt: skip

    q, lengths = array(BATCH, HEADS, WIDTH), array(BATCH, dtype=jnp.int32)
    table = array(BATCH, pages, dtype=jnp.int32)
    if case.library == "jax paged_attention":
        pool = array(KEY_HEADS, BATCH * pages, PAGE_SIZE, WIDTH)
        return paged, (q, pool, pool, lengths, table)
    pool = array(BATCH * pages, PAGE_SIZE, 2 * KEY_HEADS, WIDTH)
    return ragged, (q, pool, lengths, table, array(BATCH + 1, dtype=jnp.int32), array(1, dtype=jnp.int32))


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each chip and kernel, at its best of the block sizes."""
    lines = []
    for chip in CHIPS:
        best: dict[str, tuple[float, int, dict[str, Any]]] = {}
        for key, figures in found.items():
            library, at, block = key.split("/")
            now = figures["of a token"], int(block), figures
            if at == chip and (library not in best or now[0] < best[library][0]):
                best[library] = now
        for library in [name for name in LIBRARIES if name in best]:
            each, block, figures = best[library]
            peers = {peer: f"{each / best[peer][0]:.2f}" for peer in LIBRARIES if peer in best and "jax" in peer}
            lines.append({
                "chip": chip, "kernel": library, "block": block, "bundles a block": f"{figures['bundles']:,}",
                "a token and key head": f"{each:.3f}", "floor": "-" if chip == "v6e" else f"{figures['floor']:.2f}",
                **{f"/ {peer}": ratio if "jax" not in library else "" for peer, ratio in peers.items()},
            })  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--blocks", nargs="+", type=int, default=BLOCKS)
    parser.add_argument("--page", action="store_true", help="write the table into docs/kernels.md, compile nothing")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        library, chip, block = arguments.child
        _child(Case(library, chip, int(block)))
        return
    found = json.loads(arguments.output.read_text())["cases"] if arguments.output.exists() else {}
    wanted = [Case(x, c, b) for x in arguments.libraries for c in arguments.chips for b in arguments.blocks]
    for case in [] if arguments.page else wanted:
        key = "/".join(map(str, case))
        found[key] = measure(case)
        body = {"benchmark": "kernels/schedules/decode", "machine": machine(), "cases": found, "rows": rows(found)}
        arguments.output.write_text(json.dumps(body, indent=1) + "\n")
        print(key, found[key], flush=True)
    print(table(rows(found)))
    if arguments.page:
        tables.put(PAGE, "kernels/schedules/decode", table(rows(found)))


if __name__ == "__main__":
    main()
