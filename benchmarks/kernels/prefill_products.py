"""The floor of a prefill of SmolLM2-135M on CPUs: its matrix products alone, in XLA and in torch.

    python -m benchmarks.kernels.prefill_products                  # some 2 minutes on 2 quiet cores
    python -m benchmarks.kernels.prefill_products --dtypes int8    # joined to the rows that the results have of others

A prefill of 1,024 tokens multiplies by four matrices in each of 30 layers, 217 GFLOP, and by causal attention's logits
and probabilities, 36 GFLOP where no masked pair is computed. Here each runtime does these products and nothing else:
the matrices as `streamjax.models.parameters.product` and `torch.nn.functional.linear` have them, streamjax in its
chunks of 512 tokens, and attention's as batches over the three key heads. Each side and dtype has a process of its own.

`GFLOP/s` are of a second of the CPU's time, so that cores and other work matter little. torch has one thread for that:
its threads wait for each other by running on. `products, CPU s` are what the products of one prefill take at that rate,
`prefill, CPU s` all of one (`benchmarks.models.vs_transformers`), `left` what the prefill takes beside them. `most` is
transformers' whole prefill over this side's products: how many times as fast this side could be if nothing but products
took time. `left for 1.3` is what a prefill that takes transformers' CPU seconds over 1.3 may take beside its products.

There is no prefill in int8: the row says what its products would take, of int8 times int8 in int32, which XLA hands to
YNNPACK. They are slower than those of bfloat16 on a CPU that has instructions for both (avx512_vnni, avx512_bf16), so
activations rounded to 8 bits would gain nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.reporting import RESULTS, in_turn, report

MODULE = "benchmarks.kernels.prefill_products"
SIDES, DTYPES = ("transformers", "streamjax"), ("float32", "bfloat16", "int8")
TOKENS, CHUNK, LAYERS = 1024, 512, 30
MATRICES = ((576, 960), (576, 576), (576, 3072), (1536, 576))  # qkv, out, gate and up, down
KEY_HEADS, QUERIES, WIDTH = 3, 3 * CHUNK, 64
ATTENTION = ((QUERIES, WIDTH, CHUNK), (QUERIES, CHUNK, WIDTH))  # logits, and probabilities times values
LAYER_FLOP = LAYERS * sum(2 * TOKENS * n * m for n, m in MATRICES)
ATTENTION_FLOP = LAYERS * 2 * 2 * (9 * WIDTH) * TOKENS * (TOKENS + 1) // 2
ASKED = 1.3


def xla_product(dtype: str) -> tuple[Callable[..., Any], Callable[..., Any], int]:
    """How streamjax multiplies, from NumPy to arrays, and the rows of one product."""
    import jax
    import jax.numpy as jnp

    from streamjax.host_programs import program
    from streamjax.models.parameters import product

    @program(static_argnames="equation")
    def multiply(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
        if dtype == "int8":
            return jnp.einsum(equation, x, w, preferred_element_type=jnp.int32)
        return product(equation, x, w)

    def run(x: jax.Array, w: jax.Array) -> None:
        multiply("tn,nm->tm" if x.ndim == 2 else "btn,bnm->btm", x, w).block_until_ready()

    scale = 32 if dtype == "int8" else 1
    return run, lambda x: jnp.asarray(scale * x, dtype), CHUNK


def torch_product(dtype: str) -> tuple[Callable[..., Any], Callable[..., Any], int]:
    """How `transformers` multiplies; matrices lie output-major there."""
    import torch

    torch.set_num_threads(1)

    @torch.inference_mode()
    def run(x: torch.Tensor, w: torch.Tensor) -> None:
        torch.nn.functional.linear(x, w.T) if x.ndim == 2 else torch.bmm(x, w)

    def tensor(x: np.ndarray) -> torch.Tensor:
        made = torch.tensor(x, dtype=getattr(torch, dtype))
        return made.T.contiguous().T if x.ndim == 2 and x.shape[0] != TOKENS else made

    return run, tensor, TOKENS


def rate(run: Callable[[], Any], flop: float, turns: int) -> float:
    """Operations a second of the CPU's time, the median over turns of a quarter of a second."""
    run()
    times, found = max(1, round(2.5e10 / flop)), []
    for _ in range(turns):
        start = time.process_time()
        for _ in range(times):
            run()
        found.append(flop * times / (time.process_time() - start))
    return statistics.median(found)


def measure(side: str, dtype: str, turns: int) -> dict[str, float]:
    """CPU seconds of a prefill's products by matrices, and of attention's."""
    multiply, array, rows = (torch_product if side == "transformers" else xla_product)(dtype)
    draw = np.random.default_rng(0).standard_normal
    layers = attention = 0.0
    for n, m in MATRICES:
        x, w, flop = array(draw((rows, n))), array(draw((n, m))), 2.0 * rows * n * m
        layers += LAYERS * 2.0 * TOKENS * n * m / rate(lambda x=x, w=w: multiply(x, w), flop, turns)  # type: ignore[misc]
    for t, n, m in ATTENTION:
        x, w, flop = array(draw((KEY_HEADS, t, n))), array(draw((KEY_HEADS, n, m))), 2.0 * KEY_HEADS * t * n * m
        attention += ATTENTION_FLOP / 2 / rate(lambda x=x, w=w: multiply(x, w), flop, turns)  # type: ignore[misc]
    return {"layers": layers, "attention": attention}


def joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and those of other dtypes that the results have, in the order of `DTYPES`."""
    path = RESULTS / "kernels/prefill_products.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    found = {(row["dtype"], row["side"]): row for row in [*old, *rows]}
    return [found[key] for key in itertools.product(DTYPES, SIDES) if key in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side; the median counts")
    parser.add_argument("--turns", type=int, default=5, help="turns of a process, behind one that warms up")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child, arguments.turns)))
        return
    sides = itertools.product(arguments.dtypes, SIDES)
    cases = {(dtype, side): (side, dtype) for dtype, side in sides if (dtype, side) != ("int8", SIDES[0])}
    found = in_turn(MODULE, arguments.rounds, cases, "--turns", arguments.turns)
    whole = {
        (row["dtype"], row["side"]): row["CPU seconds"]
        for row in json.loads((RESULTS / "models/vs_transformers.json").read_text())["rows"]
        if row["phase"] == "prefill"
    }
    rows = []
    for (dtype, side), runs in found.items():
        layers, attention = (statistics.median(run[key] for run in runs) for key in ("layers", "attention"))
        both = layers + attention
        row = {
            "dtype": dtype,
            "side": side,
            "GFLOP/s, matrices": LAYER_FLOP / layers / 1e9,
            "GFLOP/s, attention": ATTENTION_FLOP / attention / 1e9,
            "products, CPU s": both,
        }
        if dtype != "int8":
            theirs = whole[dtype, SIDES[0]]
            row |= {
                "prefill, CPU s": whole[dtype, side],
                "left": whole[dtype, side] - both,
                "most": theirs / both,
                "left for 1.3": theirs / ASKED - both,
            }
        rows.append(row)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    report("kernels/prefill_products", joined(rows), rounds=arguments.rounds, turns=arguments.turns, **versions)


if __name__ == "__main__":
    main()
