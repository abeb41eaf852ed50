"""Recurrences over matrix states on TPUs by their static schedules, beside tokamax's gated delta rule: no TPU needed.

    python -m benchmarks.kernels.schedules.recurrence                    # some minutes on 2 quiet cores; or --chips v5e
    python -m benchmarks.kernels.schedules.recurrence --tokamax FOLDER   # with tokamax, of an unpacked wheel
    python -m benchmarks.kernels.schedules.recurrence --page             # write the table into docs/kernels.md

`chunkwise_recurrence` of 2,048 tokens in bfloat16, forwards and backwards, at the heads of Qwen3-Next 80B, Kimi-Linear
48B, Mamba-2 1.3B and Codestral Mamba, and of 8 value heads of Qwen3.5 397B and Kimi-Linear. A TPU executes one bundle a
cycle but for stalls (`schedule_listing.py`); counted is a step of the grid in the midst of a sequence, a block of
tokens of some heads. tokamax (0.0.17) has the delta rule, with a decay a head or a channel, in one kernel with the
layer's short convolution, norms and gates, which here XLA fuses into what makes the kernel's operands; that kernel has
no backward pass, and it takes all heads of a tile of tokens, as many as its own heuristic says, at once.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from benchmarks import aot, tables
from benchmarks.kernels.schedules import schedule_listing
from benchmarks.reporting import RESULTS, report, table

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "h100": "h100"}
MODELS = {  # groups, heads of a group, rows and columns of a state, a decay for each row, the delta rule
    "Qwen3-Next 80B": (16, 2, 128, 128, False, True),
    "Qwen3.5 397B, an eighth": (2, 4, 128, 128, False, True),
    "Kimi-Linear 48B": (32, 1, 128, 128, True, True),
    "Kimi-Linear 48B, a quarter": (8, 1, 128, 128, True, True),
    "Mamba-2 1.3B": (1, 64, 128, 64, False, False),
    "Codestral Mamba": (8, 16, 128, 64, False, False),
}
TOKENS = 2048
TOKAMAX = "tokamax"
PASSES = ("forward", "backward")
PAGE = aot.ROOT / "docs" / "kernels.md"


def measure(chip: str, model: str, tokamax: str = "") -> list[dict[str, Any]]:
    """A line for each pass, compiled in a process of its own; with a folder, of tokamax's kernel.

    Raises:
      RuntimeError: the compiler refused it.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
        environment = aot.child_environment(CHIPS[chip])
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} {flags}"
        command = [sys.executable, "-m", "benchmarks.kernels.schedules.recurrence", "--child", chip, model, tokamax]
        done = subprocess.run(command, env=environment, cwd=aot.ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{chip}, {model}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        made = json.loads(done.stdout.splitlines()[-1])
        lines = []
        for kernel in ("fused_conv1d_*_per_seq",) if tokamax else tuple(f"recurrence_{name}" for name in PASSES):
            (listing,) = (
                path for path in Path(folder).glob(f"*{kernel}*-final_bundles.txt")
                if "schedule-analysis" not in path.name
            )  # fmt: skip
            found = bundles(listing, bool(tokamax))
            line = {"chip": chip, "model": model, "kernel": TOKAMAX if tokamax else "ours"}
            line |= {"pass": "forward" if tokamax else kernel.removeprefix("recurrence_"), **made}
            lines.append(line | {"bundles a step": found, "a token and head": found / made["tokens"] / made["heads"]})
    return lines


def bundles(listing: Path, tokamax: bool) -> int:
    """Of a step in the midst of a sequence: what only some steps do is left out, copies of tokamax's among it.

    Gradients of queries and keys that several steps share are written by one region and added to by another.
    """
    loop = (schedule_listing.innermost if tokamax else schedule_listing.read)(listing)
    return loop.always


def compile_for(chip: str, model: str, tokamax: str) -> None:
    """Compile, and print how many tokens and heads a step has."""
    import jax
    from jax.sharding import SingleDeviceSharding

    device = aot.devices(CHIPS[chip])[0]
    place = SingleDeviceSharding(device)

    def array(*shape: int, dtype: Any = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    function, arrays, made = (
        _tokamax(model, array, tokamax, device.device_kind) if tokamax else both_passes(chip, model, array)
    )
    platform = "cuda" if chip == "h100" else "tpu"
    compiled = jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).compile()
    print(json.dumps({**made, "temporaries, MB": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)}))


def both_passes(chip: str, model: str, array: Any) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    """A function, what it is given, and the tokens and heads of a step."""
    import jax

    from pallas_kernels import api
    from pallas_kernels.tpu.recurrence import chunkwise

    groups, shared, rows, columns, channels, delta = MODELS[model]
    pair, heads = (1, TOKENS, groups, rows), (1, TOKENS, groups, shared)
    narrow = {"dtype": "bfloat16"}
    values, state = array(*heads, columns, **narrow), array(1, groups, shared, rows, columns)
    given = array(*pair, **narrow), array(*pair, **narrow), values, array(*heads, *([rows] * channels)), state

    def both(given: Any, beta: Any, cotangents: Any) -> Any:
        def read(given: Any, beta: Any) -> Any:
            implementation: Any = "triton" if chip == "h100" else "tpu"
            return api.chunkwise_recurrence(*given, beta=beta, implementation=implementation)

        out, pull = jax.vjp(read, given, beta)
        return out, pull(cotangents)

    made = {"tokens": chunkwise.block_size(channels, TOKENS), "heads": chunkwise.HEADS}
    return both, (given, array(*heads) if delta else None, (values, state)), made


def _tokamax(model: str, array: Any, folder: str, kind: str) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    """Its kernel's own module: what the package itself imports wants a later JAX."""
    import jax.numpy as jnp
    from jax._src.pallas.mosaic import tpu_info

    for depth, name in enumerate(("tokamax", "tokamax._src", "tokamax._src.ops")):
        module = types.ModuleType(name)
        module.__path__ = [str(Path(folder, *("tokamax", "_src", "ops")[: depth + 1]))]
        sys.modules[name] = module
    tpu_info.get_device_kind, tpu_info.get_num_device_cores = (lambda: kind, lambda: 1)  # it asks while it traces
    wrapper = __import__("tokamax._src.ops.causal_conv1d_gated_delta_rule.wrapper", fromlist=["wrapper"])
    config = __import__("tokamax._src.ops.causal_conv1d_gated_delta_rule.config", fromlist=["config"])
    groups, shared, rows, columns, channels, _ = MODELS[model]
    heads, narrow = groups * shared, {"dtype": "bfloat16"}
    decays = (heads, rows) if channels else (heads,)
    width, made, sizes = 2 * groups * rows + heads * columns, {"heads": heads}, wrapper.tiling.get_tile_sizes

    def tiles(**known: Any) -> Any:
        found = sizes(**known)
        made["tokens"] = found[1]
        return found

    wrapper.tiling.get_tile_sizes = tiles

    def layer(*arrays: Any) -> Any:
        def numbers(*x: int) -> Any:
            return jnp.asarray(x, jnp.int32)

        places = numbers(0, TOKENS), numbers(1), numbers(0, 1, 1), numbers(TOKENS)
        known = {"n_kq": groups, "n_v": heads, "d_k": rows, "d_v": columns, "kernel_size": 4}
        known["attention_mode"] = config.AttentionMode.KDA if channels else config.AttentionMode.GDN
        return wrapper.fused_conv1d_gdn(*arrays, *places, **known)

    shapes = (TOKENS, width), (TOKENS, heads), (TOKENS, math.prod(decays)), (2, 3, width), (2, heads, rows, columns)
    shapes += (width, 1, 4), (width,), (heads,), decays
    arrays = [array(*shape, **({} if place in (4, 7) else narrow)) for place, shape in enumerate(shapes)]
    return layer, tuple(arrays), made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tpus = [chip for chip in CHIPS if chip != "h100"]
    parser.add_argument("--chips", nargs="+", choices=tpus, default=tpus)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokamax", default="", help="the folder that tokamax's wheel was unpacked into")
    parser.add_argument("--page", action="store_true", help="write the table into docs/kernels.md, compile nothing")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        compile_for(*arguments.child)
        return
    output = RESULTS / "kernels/schedules/recurrence.json"
    if arguments.page:
        tables.put(PAGE, "kernels/schedules/recurrence", table(json.loads(output.read_text())["rows"]))
        return
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    for chip in arguments.chips:
        for model in arguments.models:
            put(rows, measure(chip, model))
            if arguments.tokamax and chip == "v5e" and MODELS[model][-1]:
                put(rows, measure(chip, model, arguments.tokamax))
            report("kernels/schedules/recurrence", rows)


def put(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Add lines in the order of chips and models, in the place of those that are there for the same kernel."""

    def place(row: dict[str, Any]) -> tuple[int, int, bool, int]:
        models, chips = list(MODELS), list(CHIPS)
        return chips.index(row["chip"]), models.index(row["model"]), row["kernel"] == TOKAMAX, PASSES.index(row["pass"])

    kept = {place(row): row for row in [*rows, *lines]}
    rows[:] = [kept[at] for at in sorted(kept)]


if __name__ == "__main__":
    main()
