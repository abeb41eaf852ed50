"""Does the fused cross-entropy beat XLA's, by the compiler's own figures? No TPU needed.

    python -m benchmarks.kernels.cross_entropy            # some minutes on 2 cores
    python -m benchmarks.kernels.cross_entropy --page     # write the table into docs/kernels.md, compile nothing

The library's pass from hidden states to the loss and its gradients (`training/backprop/embedding_and_head.py`), over
2,048 tokens in bfloat16; the output matrix's gradient is summed in float32. `xla` makes 256 MiB of logits at once, for
the loss and its gradient: three products. `xla whole` makes all of them. `fused` is the kernel, which never
writes logits: a forward pass over blocks of the vocabulary for the statistics, and a backward pass that makes the
logits again: four products. `at least` is what the operations take at the chip's peak, or the bytes at its bandwidth,
whichever is more (JAX's table of TPUs). XLA's `cycles` are what the compiler expects of its fusions; the kernel's are
its bundles times its steps, in which waiting for the matrix units does not show: where they are less than `at least`,
that counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import aot, tables
from benchmarks.estimated_cycles import estimate
from benchmarks.kernels.schedules import schedule_listing
from benchmarks.reporting import RESULTS, report, table

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
FORMS = ("xla", "xla whole", "fused")
MODELS = {896: "qwen2.5-0.5b", 2560: "gemma-3-4b", 4096: "qwen3-8b"}  # by width
TOKENS = 2048
KERNELS = ("token_stats_forward", "token_stats_backward")
SHOWN = {"million cycles": "cycles", "temporaries, MB": "temp"}
OUTPUT = RESULTS / "kernels/cross_entropy.json"
PAGE = aot.ROOT / "docs" / "kernels.md"


def measure(chip: str, width: int, form: str) -> dict[str, Any]:
    """A line of the table, compiled in a process of its own.

    Raises:
      RuntimeError: the compiler refused it.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
        environment = aot.child_environment(CHIPS[chip])
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} {flags}" if form == "fused" else ""
        command = [sys.executable, "-m", "benchmarks.kernels.cross_entropy", "--child", chip, str(width), form]
        done = subprocess.run(command, env=environment, cwd=aot.ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{chip}, {width}, {form}: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout.splitlines()[-1])
        for kernel in KERNELS if "steps" in found else ():
            (listing,) = schedule_listing.listings(Path(folder), kernel)
            found["cycles"] += bundles(listing, *found["steps"][kernel])
    least = max(found["flops"] / found["peak"], found["bytes"] / found["bandwidth"])
    return {
        "chip": chip, "width": width, "form": form, "TFLOP": found["flops"] / 1e12, "GB": found["bytes"] / 1e9,
        "at least, ms": 1e3 * least, **{name: found[key] / 1e6 if key in found else "-" for name, key in SHOWN.items()},
    }  # fmt: skip


def bundles(listing: Path, steps: float, pieces: int) -> float:
    """Bundles of all steps of one of the `KERNELS`, each of which takes a tile in pieces."""
    step, piece = (
        loop.always + sum(region.size for region in loop.tiles)
        for loop in (schedule_listing.read(listing), schedule_listing.innermost(listing))
    )
    return steps * (step + (pieces - 1) * piece)


def steps_of(kernel: str, tokens: int, width: int, vocabulary: int) -> tuple[int, int]:
    """Steps of the grid of one of the `KERNELS` over tokens in bfloat16, and pieces of its tiles."""
    from pallas_kernels.tpu import token_stats

    tile, block = token_stats.sizes(tokens, width, vocabulary, 2, kernel == KERNELS[1])
    return -(-tokens // tile) * -(-vocabulary // block), tile // token_stats.PIECE


def _child(chip: str, width: int, form: str) -> None:
    import jax
    from jax._src.pallas.mosaic import tpu_info

    from benchmarks.model_shapes import SHAPES
    from pallas_kernels.tpu import token_stats

    device = aot.devices(CHIPS[chip])[0]
    kind = device.device_kind
    tpu_info.get_device_kind, tpu_info.get_num_device_cores = lambda: kind, lambda: 1
    config, info = SHAPES[MODELS[width]], tpu_info.get_tpu_info()
    vocabulary, entries = config.vocab_size, width * config.vocab_size
    cores = info.chip_version.num_physical_tensor_cores_per_chip
    found: dict[str, Any] = {
        "peak": cores * info.bf16_ops_per_second,
        "bandwidth": cores * info.mem_bw_bytes_per_second,
    }
    compiled, pieces = _compiled(config, device, form)
    found["temp"] = compiled.memory_analysis().temp_size_in_bytes
    if form == "fused":
        steps, passes = {}, []
        for kernel in KERNELS:
            turns, pieces = steps_of(kernel, TOKENS, width, vocabulary)
            steps[kernel] = turns / cores, pieces
            passes.append(-(-TOKENS // (pieces * token_stats.PIECE)))
        # both passes read the matrix once a tile, and the backward pass its gradient, which it writes
        moved = 2 * sum(passes) * entries + 2 * 4 * passes[1] * entries
        found |= {"flops": 4 * 2 * TOKENS * entries, "bytes": moved, "cycles": 0, "steps": steps}
    else:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX cannot read gathers on a v6e's sparse cores
            text = compiled.as_text()
            found["cycles"] = pieces * estimate(text, turns=1).cycles
        moved = pieces * compiled.cost_analysis()["bytes accessed"]
        found |= {"flops": 3 * 2 * TOKENS * entries, "bytes": moved}
    print(json.dumps(found))


def _compiled(config: Any, device: Any, form: str) -> tuple[Any, float]:
    """The library's pass over one piece, compiled, and how many pieces the tokens are."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    import streamjax as sj
    from pallas_kernels.api import platforms
    from streamjax.training.backprop import embedding_and_head
    from streamjax.training.backprop.gradient_options import GradientOptions
    from streamjax.training.objectives.objective import CrossEntropy

    platforms.platform_implementation = lambda: "tpu" if form == "fused" else None  # JAX runs on a CPU here
    place = SingleDeviceSharding(device)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)

    def shapes() -> Any:
        whole = sj.Decoder(config, jax.random.key(0), dtype=jnp.bfloat16, scan_layers=True)
        return whole, embedding_and_head.output_zeros(whole, options)

    size = TOKENS
    options = GradientOptions(logits_chunk=size, kv_grad_dtype=jnp.float32)
    model, grads = placed(jax.eval_shape(shapes))
    if form == "xla":
        size = min(TOKENS, embedding_and_head.default_logits_chunk(model, 1))

    def step(model: Any, hidden: Any, prepared: Any, grads: Any) -> Any:
        return embedding_and_head.loss_and_vjp(model, options, hidden, prepared, CrossEntropy(), grads)

    hidden, each = jnp.zeros((1, size, config.d_model), jnp.bfloat16), jnp.zeros((1, size))
    prepared = {"targets": each.astype(jnp.int32), "weights": each}
    traced = jax.jit(step, donate_argnums=(3,)).trace(model, placed(hidden), placed(prepared), grads)
    return traced.lower(lowering_platforms=("tpu",)).compile(), TOKENS / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--widths", nargs="+", type=int, choices=MODELS, default=list(MODELS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--page", action="store_true", help="write the table into docs/kernels.md, compile nothing")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        chip, width, form = arguments.child
        _child(chip, int(width), form)
    elif arguments.page:
        found = json.loads(OUTPUT.read_text())["rows"]
        tables.put(PAGE, "kernels/cross_entropy", table(found))
    else:
        wanted = [(c, w, form) for w in arguments.widths for c in arguments.chips for form in arguments.forms]
        saved = json.loads(OUTPUT.read_text())["rows"] if OUTPUT.exists() else []
        lines = {(row["width"], row["chip"], FORMS.index(row["form"])): row for row in saved}
        for chip, width, form in wanted:
            lines[width, chip, FORMS.index(form)] = measure(chip, width, form)
            report("kernels/cross_entropy", [lines[key] for key in sorted(lines)], OUTPUT)


if __name__ == "__main__":
    main()
