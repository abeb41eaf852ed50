"""Would a fused cross-entropy be faster than XLA's, by the compiler's own figures? No TPU needed.

    python -m benchmarks.cross_entropy_aot            # some minutes on 2 cores
    python -m benchmarks.cross_entropy_aot --page     # write the table into docs/kernels.md, compile nothing

Loss and gradients of 2,048 tokens, V = 151,936, bfloat16; the output matrix's gradient is summed in float32. `xla` is
what the library does: pieces of 441 tokens, whose logits (256 MiB) are in memory once, for the loss and its gradient:
three products. `xla whole` makes all logits at once (1.2 GB). `fused` is a Pallas kernel that never writes logits: a
forward pass over blocks of the vocabulary for the log-sum-exps, and a backward pass that makes the logits again: four
products. `at least` is what the operations take at the chip's peak, or the bytes at its bandwidth, whichever is more
(JAX's table of TPUs). XLA's `cycles` are what the compiler expects of its fusions; the kernel's are its bundles times
its steps, in which waiting for the matrix units does not show: where they are less than `at least`, that counts. At
width 4,096, where products rule, the kernel is not compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import aot, tables, tpu_bundles
from benchmarks.common import RESULTS, report, table

CHIPS = {"v5e": "v5e:1x1", "v6e": "v6e:1x1"}
FORMS = ("xla", "xla whole", "fused")
MODELS = {896: "qwen2.5-0.5b", 4096: "qwen3-8b"}  # by width
TOKENS, BLOCK, PIECE = 2048, 512, 256  # BLOCK: of the vocabulary; PIECE: tokens of a product
KERNELS = ("cross_entropy_forward", "cross_entropy_backward")
SHOWN = {"million cycles": "cycles", "temporaries, MB": "temp"}
OUTPUT = RESULTS / "cross_entropy_aot.json"
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
        command = [sys.executable, "-m", "benchmarks.cross_entropy_aot", "--child", chip, str(width), form]
        done = subprocess.run(command, env=environment, cwd=aot.ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{chip}, {width}, {form}: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout.splitlines()[-1])
        for kernel in KERNELS if "steps" in found else ():
            (listing,) = (
                path for path in Path(folder).glob(f"*{kernel}*-final_bundles.txt")
                if "schedule-analysis" not in path.name
            )  # fmt: skip
            loop = tpu_bundles.read(listing)
            found["cycles"] += found["steps"] * (loop.always + sum(region.size for region in loop.tiles))
    least = max(found["flops"] / found["peak"], found["bytes"] / found["bandwidth"])
    return {
        "chip": chip, "width": width, "form": form, "TFLOP": found["flops"] / 1e12, "GB": found["bytes"] / 1e9,
        "at least, ms": 1e3 * least, **{name: found[key] / 1e6 if key in found else "-" for name, key in SHOWN.items()},
    }  # fmt: skip


def _child(chip: str, width: int, form: str) -> None:
    import jax
    import jax.numpy as jnp
    from jax._src.pallas.mosaic import tpu_info
    from jax.sharding import SingleDeviceSharding

    from benchmarks.shapes import SHAPES

    device = aot.devices(CHIPS[chip])[0]
    kind, place = device.device_kind, SingleDeviceSharding(device)
    tpu_info.get_device_kind, tpu_info.get_num_device_cores = lambda: kind, lambda: 1

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    config = SHAPES[MODELS[width]]
    vocabulary, info = config.vocab_size, tpu_info.get_tpu_info()
    found: dict[str, Any] = {"peak": info.bf16_ops_per_second, "bandwidth": info.mem_bw_bytes_per_second}
    product = 2 * TOKENS * vocabulary * width
    if form == "fused":
        matrix = 2 * width * vocabulary
        # both passes read the output matrix, and the backward pass its gradient, which it writes
        found |= {"flops": 4 * product, "bytes": 2 * matrix + 2 * 2 * matrix}
        if width <= 1024:
            x, w, grads = array(TOKENS, width), array(vocabulary, width), array(vocabulary, width, dtype=jnp.float32)
            traced = jax.jit(fused, donate_argnums=(3,)).trace(x, w, array(TOKENS, 1, dtype=jnp.int32), grads)
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
            temporary = compiled.memory_analysis().temp_size_in_bytes
            found |= {"cycles": 0, "steps": -(-vocabulary // BLOCK), "temp": temporary}
    else:
        compiled, pieces = _xla(config, array, TOKENS if form == "xla whole" else None)
        with contextlib.suppress(
            jax.errors.JaxRuntimeError
        ):  # JAX cannot read gathers that run on a v6e's sparse cores
            text = compiled.as_text()
            found["cycles"] = pieces * sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
        found |= {"flops": 3 * product, "bytes": pieces * compiled.cost_analysis()["bytes accessed"]}
        found["temp"] = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps(found))


def _xla(config: Any, array: Any, size: int | None) -> tuple[Any, float]:
    """The library's pass over one piece, compiled, and how many pieces the tokens are."""
    import jax
    import jax.numpy as jnp

    import streamjax as sj
    from streamjax.training import ends
    from streamjax.training.objectives import CrossEntropy
    from streamjax.training.options import Options

    def shapes() -> Any:
        return sj.Decoder(config, jax.random.key(0), dtype=jnp.bfloat16, scan_layers=True)

    model = jax.tree.map(lambda leaf: array(*leaf.shape, dtype=leaf.dtype), jax.eval_shape(shapes))
    size = size or ends.default_logits_chunk(model, 1)
    options = Options(logits_chunk=size, kv_grad_dtype=jnp.float32)

    def step(model: Any, hidden: Any, prepared: Any, grads: Any) -> Any:
        return ends.loss_and_pull_back(model, options, hidden, prepared, CrossEntropy(), grads)

    grads = jax.tree.map(
        lambda leaf: array(*leaf.shape, dtype=leaf.dtype),
        jax.eval_shape(lambda model: ends.output_zeros(model, options), model),
    )
    prepared = {"targets": array(1, size, dtype=jnp.int32), "weights": array(1, size, dtype=jnp.float32)}
    traced = jax.jit(step, donate_argnums=(3,)).trace(model, array(1, size, config.d_model), prepared, grads)
    return traced.lower(lowering_platforms=("tpu",)).compile(), TOKENS / size


def fused(x: Any, w: Any, targets: Any, grads: Any) -> Any:
    """Mean loss of tokens x [N, E] for an output matrix w [V, E] and targets [N, 1]; gradient of x, sum of `grads`.

    The last block of the vocabulary is not cut: a kernel that was used would have to mask it.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    tokens, width = x.shape
    steps = -(-w.shape[0] // BLOCK)
    once = pl.BlockSpec((tokens, width), lambda j: (0, 0), pipeline_mode=pl.Buffered(1))
    each = pl.BlockSpec((BLOCK, width), lambda j: (j, 0))
    column = pl.BlockSpec((tokens, 1), lambda j: (0, 0))
    known: dict[str, Any] = {
        "grid": (steps,),
        "compiler_params": pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=100 * 2**20),
    }
    column_shape = jax.ShapeDtypeStruct((tokens, 1), jnp.float32)
    lse, logit = pl.pallas_call(
        partial(_forward, tokens, steps), in_specs=[once, each, column], out_specs=[column, column],
        out_shape=[column_shape, column_shape],
        scratch_shapes=[pltpu.VMEM((tokens, 128), jnp.float32)] * 3, name=KERNELS[0], **known,
    )(x, w, targets)  # fmt: skip
    d_x, grads = pl.pallas_call(
        partial(_backward, tokens), in_specs=[once, each, column, column, each], out_specs=[once, each],
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32), jax.ShapeDtypeStruct(w.shape, jnp.float32)],
        input_output_aliases={4: 1}, name=KERNELS[1], **known,
    )(x, w, targets, lse, grads)  # fmt: skip
    return jnp.mean(lse - logit), d_x, grads


def _forward(tokens: int, steps: int, x: Any, w: Any, targets: Any, lse: Any, logit: Any, *state: Any) -> None:
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl

    j, (top, total, chosen) = pl.program_id(0), state

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, -1e30)
        total[...], chosen[...] = jnp.zeros_like(total), jnp.zeros_like(chosen)

    for low in range(0, tokens, PIECE):
        at = pl.ds(low, PIECE)
        logits = lax.dot_general(x[at], w[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        now = jnp.maximum(top[at], jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - jnp.tile(now, (1, BLOCK // 128)))
        total[at] = total[at] * jnp.exp(top[at] - now) + jnp.sum(weights, axis=1, keepdims=True)
        hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[at] - j * BLOCK
        chosen[at] += jnp.sum(jnp.where(hit, logits, 0.0), axis=1, keepdims=True)
        top[at] = now

    @pl.when(j == steps - 1)
    def _() -> None:
        lse[...] = (top[...] + jnp.log(total[...]))[:, :1]
        logit[...] = chosen[:, :1]


def _backward(
    tokens: int, x: Any, w: Any, targets: Any, lse: Any, before: Any, d_x: Any, d_w: Any
) -> None:  # fmt: skip
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl

    j = pl.program_id(0)

    @pl.when(j == 0)
    def _() -> None:
        d_x[...] = jnp.zeros_like(d_x)

    d_w[...] = before[...]
    for low in range(0, tokens, PIECE):
        at = pl.ds(low, PIECE)
        logits = lax.dot_general(x[at], w[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[at] - j * BLOCK
        slope = (jnp.exp(logits - lse[at]) - jnp.where(hit, 1.0, 0.0)) * (1.0 / tokens)
        slope = slope.astype(x.dtype)
        d_x[at] += lax.dot_general(slope, w[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        d_w[...] += lax.dot_general(slope, x[at], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--widths", nargs="+", type=int, choices=MODELS, default=list(MODELS))
    parser.add_argument("--page", action="store_true", help="write the table into docs/kernels.md, compile nothing")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        chip, width, form = arguments.child
        _child(chip, int(width), form)
    elif arguments.page:
        found = json.loads(OUTPUT.read_text())["rows"]
        tables.put(PAGE, "cross_entropy_aot", table(found))
    else:
        wanted = [(c, w, form) for w in arguments.widths for c in arguments.chips for form in FORMS]
        saved = json.loads(OUTPUT.read_text())["rows"] if OUTPUT.exists() else []
        lines = {(row["width"], row["chip"], FORMS.index(row["form"])): row for row in saved}
        for chip, width, form in wanted:
            lines[width, chip, FORMS.index(form)] = measure(chip, width, form)
            report("cross_entropy_aot", [lines[key] for key in sorted(lines)], OUTPUT)


if __name__ == "__main__":
    main()
