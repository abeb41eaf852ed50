"""Our attention kernels against JAX's splash attention by their static schedules on a TPU: no TPU needed.

    python -m benchmarks.kernels.schedules.flash      # causal, local, and sinks; about half an hour on 2 cores
    python -m benchmarks.kernels.schedules.flash --chips v5e --masks causal --blocks 1024x1024
    python -m benchmarks.kernels.schedules.flash --table              # compile nothing, print what there is

One head of width 128 in bfloat16, forwards and backwards, compiled for the chip. A TPU executes the bundles of a
kernel's schedule in order, one a cycle but for stalls; so bundles a step, times the steps of the grid that take the
same way through the kernel, stand for its time. Ways: a tile that the mask does not cut and one that it does (in splash
one code for both), a step that computes nothing, and what a block does first and last. For each mask and kernel both
libraries show their best of the block sizes. `sinks` is `local` with 4 sinks, which splash does not have: it is
compared with our `local`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import aot, tables
from benchmarks.kernels.schedules import schedule_listing
from benchmarks.reporting import RESULTS, machine, table

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
MASKS = {"causal": (32768, None, 0), "local": (131072, 4096, 0), "sinks": (131072, 4096, 4)}  # tokens, window, sinks
BLOCKS = ("512x512", "512x1024", "1024x512", "1024x1024")
KERNELS = ("forward", "dq", "dkv")
OUTPUT = RESULTS / "kernels/schedules/flash.json"
PAGE = aot.ROOT / "docs" / "kernels.md"


class Case(NamedTuple):
    """One compile: all three kernels of a library."""

    library: str  # "ours" or "splash"
    chip: str
    mask: str
    blocks: str

    @property
    def sizes(self) -> tuple[int, int]:
        block_q, block_k = map(int, self.blocks.split("x"))
        return block_q, block_k


class Steps(NamedTuple):
    """Steps of a kernel's grid by the way they take: tiles that the mask does not cut, that it cuts, none. Blocks."""

    whole: int
    cut: int
    idle: int
    blocks: int
    late: int = 0  # blocks that see a sink beyond the window


def compile_case(case: Case) -> dict[str, Any]:
    """Steps and bundles of the kernels, in a process of its own.

    Raises:
      RuntimeError: the compiler refused it.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
        environment = aot.child_environment(CHIPS[case.chip]) | {"LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, "-m", "benchmarks.kernels.schedules.flash", "--child", *case]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stderr.strip().splitlines()[-1]}")
        steps = json.loads(done.stdout.strip().splitlines()[-1])
        found = {}
        for kernel, words in _NAMES[case.library].items():
            listings = schedule_listing.listings(Path(folder), words)
            if len(listings) != 1:
                raise RuntimeError(f"{case}: {len(listings)} listings of {words}")
            loop = schedule_listing.read(listings[0])
            found[kernel] = {"steps": steps[kernel], "always": loop.always, "regions": [[*x] for x in loop.regions]}
        return found


_NAMES = {
    "ours": {"forward": "flash_forward", "dq": "flash_query_grad", "dkv": "flash_key_grad"},
    "splash": {"forward": "splash_mha_fwd", "dq": "splash_mha_dq", "dkv": "splash_mha_dkv"},
}


def cost(case: Case, kernel: str, found: Mapping[str, Any]) -> dict[str, int]:
    """Bundles of a tile, and of the whole kernel for one head.

    Raises:
      ValueError: the schedule does not have the regions that the kernel has.
    """
    steps, regions = Steps(*found["steps"]), [schedule_listing.Region(*x) for x in found["regions"]]
    tiles = [region for region in regions if region.products]
    sinks = case.mask == "sinks" and kernel != "dkv"
    if len(tiles) != (1 if case.library == "splash" else 2 + sinks):
        raise ValueError(f"{case}, {kernel}: {len(tiles)} regions with products")
    start = tiles.pop(0).size if sinks else 0
    whole, cut = tiles[0].size, tiles[-1].size
    others = sum(region.size for region in regions if not region.products)
    total = found["always"] * (steps.whole + steps.cut + steps.idle) + whole * steps.whole + cut * steps.cut
    total += others * steps.blocks + start * (steps.late if sinks else 0)
    return {"whole": whole, "cut": cut, "always": found["always"], "steps": sum(steps[:3]), "bundles": total}


def _child(case: Case) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    length, window, sinks = MASKS[case.mask]
    block_q, block_k = case.sizes
    place = SingleDeviceSharding(aot.devices(CHIPS[case.chip])[0])

    def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    if case.library == "ours":
        attention, steps = _ours(length, window, sinks, block_q, block_k)
        q, d_out = array((1, length, 1, 128)), array((1, length, 1, 128), jnp.float32)
    else:
        with jax.default_device(jax.devices("cpu")[0]):
            attention, steps = _splash(length, window, block_q, block_k)
        q = d_out = array((1, length, 128))

    def step(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(d_out)

    jax.jit(step).trace(q, q, q, d_out).lower(lowering_platforms=("tpu",)).compile()
    print(json.dumps({kernel: [int(x) for x in found] for kernel, found in steps.items()}))


def _ours(length: int, window: int | None, sinks: int, block_q: int, block_k: int) -> tuple[Any, dict[str, Steps]]:
    from pallas_kernels import api
    from pallas_kernels.patterns import Full, SinkWindow, SlidingWindow

    pattern: Any = Full()
    if window is not None:
        pattern = SinkWindow(sinks, window) if sinks else SlidingWindow(window)

    def attention(q: Any, k: Any, v: Any) -> Any:
        return api.flash_attention(q, k, v, pattern, implementation="tpu", block_q=block_q, block_k=block_k).out

    return attention, {kernel: steps_of(kernel, length, window, block_q, block_k) for kernel in KERNELS}


def steps_of(kernel: str, length: int, window: int | None, block_q: int, block_k: int) -> Steps:
    """Steps that a kernel of this library, one of `KERNELS`, takes for one head of a causal sequence."""
    from pallas_kernels.block_ranges import Ranges
    from pallas_kernels.tpu.schedule import Grid

    ranges = Ranges(length, length, block_q, block_k, window, transposed=kernel == "dkv")
    low, high = ranges.range(np.arange(ranges.blocks), 0, np)
    met = [(i, j) for i in range(ranges.blocks) for j in range(low[i], high[i])]
    whole = sum(bool(ranges.interior(*((j, i) if ranges.transposed else (i, j)), 0)) for i, j in met)
    late = sum((i + 1) * block_q > (window or length) for i in range(ranges.blocks))
    total = Grid.make(ranges, 0).steps or 0
    return Steps(whole, len(met) - whole, total - len(met), ranges.blocks, late)


def _splash(length: int, window: int | None, block_q: int, block_k: int) -> tuple[Any, dict[str, Steps]]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=block_k, block_kv_compute=block_k, block_q_dkv=block_q, block_kv_dkv=block_k,
        block_kv_dkv_compute=block_k, block_q_dq=block_q, block_kv_dq=block_k,
    )  # fmt: skip
    kernel = splash.make_splash_mha(masks.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=1)
    steps = {}
    for name, info in zip(KERNELS, (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info), strict=True):
        state = np.asarray(info.block_mask)  # 0: nothing to do, 1: cut, 2: whole
        blocks = length // (block_k if name == "dkv" else block_q)
        steps[name] = Steps(int((state == 2).sum()), int((state == 1).sum()), int((state == 0).sum()), blocks)
    return kernel, steps


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each chip, mask and kernel: both libraries at their best blocks."""
    best: dict[tuple[str, ...], tuple[int, str, dict[str, int]]] = {}
    for key, kernels in found.items():
        case = Case(*key.split("/"))
        for kernel in KERNELS:
            now = cost(case, kernel, kernels[kernel])
            place = (case.library, case.chip, case.mask, kernel)
            if place not in best or now["bundles"] < best[place][0]:
                best[place] = (now["bundles"], case.blocks, now)
    lines = []
    for (library, chip, mask, kernel), (bundles, blocks, now) in sorted(best.items()):
        peer = ("ours", chip, "local", kernel) if mask == "sinks" else ("splash", chip, mask, kernel)
        if library != "ours" or peer not in best:
            continue
        other, other_blocks, theirs = best[peer]
        lines.append({
            "chip": chip, "mask": mask, "kernel": kernel, "blocks": blocks,
            "bundles a tile": f"{now['whole']:,} / {now['cut']:,}", "steps": f"{now['steps']:,}",
            "peer's blocks": other_blocks, "peer's bundles a tile": f"{theirs['whole']:,} / {theirs['cut']:,}",
            "peer's steps": f"{theirs['steps']:,}", "ours / peer": f"{bundles / other:.3f}",
        })  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), help="queries x keys of a block")
    parser.add_argument("--libraries", nargs="+", choices=_NAMES, default=list(_NAMES))
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--page", action="store_true", help="write the table into docs/kernels.md, compile nothing")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(Case(*arguments.child))
        return
    found = json.loads(arguments.output.read_text())["cases"] if arguments.output.exists() else {}
    wanted = [Case(x, c, m, b) for c in arguments.chips for m in arguments.masks for b in arguments.blocks
              for x in arguments.libraries if (x, m) != ("splash", "sinks")]  # fmt: skip
    for case in [] if arguments.table or arguments.page else wanted:
        found["/".join(case)] = compile_case(case)
        body = {"benchmark": "kernels/schedules/flash", "machine": machine(), "cases": found, "rows": rows(found)}
        arguments.output.write_text(json.dumps(body, indent=1) + os.linesep)
        print("/".join(case), {k: cost(case, k, found["/".join(case)][k])["bundles"] for k in KERNELS}, flush=True)
    print(table(rows(found)))
    if arguments.page:
        tables.put(PAGE, "kernels/schedules/flash", table(rows(found)))


if __name__ == "__main__":
    main()
