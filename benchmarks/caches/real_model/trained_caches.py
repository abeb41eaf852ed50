"""Caches that are trained, at the bytes that they take, beside plain ones: directions (MatryoshkaKV), merges (LoCoCo)

    python -m benchmarks.caches.real_model.trained_caches --text=docstrings.txt    # what files are trained on
    python -m train.projections --model=FOLDER --input=docstrings.txt --seq_len=256 --first_tokens=2048 --share=1 \
        --steps=120 --learning_rate=3e-3 --output=trained.safetensors    # principal.safetensors: --steps=0
    python -m train.convolutions --model=FOLDER --input=docstrings.txt --seq_len=256 --window=32 --size=64 \
        --slots=32 --every=32 --width=5 --blend=0.3 --steps=40 --learning_rate=5e-3 \
        --output=kernels.safetensors    # first.safetensors: --steps=0
    python -m benchmarks.caches.real_model.trained_caches --model=FOLDER --rows=2 --projections=trained.safetensors \
        --principal=principal.safetensors --kernels=kernels.safetensors --first=first.safetensors

A model in float32 reads Python's own help topics (`pydoc_data.topics`) as streams of --tokens; `nats` are a token's on
average, behind the first --skipped. `MB` are the bytes of the state: keys, values, and the matrices that were trained.
`slots` are tokens that a layer has room for: some hold few of them, the others all in fewer numbers. The directions of
SmolLM2-135M were trained as above, by another draw of the rows, and were not searched. Those of models/stdlib_byte had
60 steps and its convolutions 77, on the built-in corpus; SmolLM2's convolutions 40, of one row each (--batch_size=1).
"""

from __future__ import annotations

import argparse
import ast
import json
import math
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

import streamjax as sj
from benchmarks.reporting import RESULTS, report
from streamjax.data.stdlib_corpus import stdlib_documents
from streamjax.kv.channels.projection_file import HeadProjections
from streamjax.kv.presets.registry import Built

NAME = "caches/real_model/trained_caches"
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def caches(arguments: argparse.Namespace) -> dict[str, Built]:
    """Every cache by name; those without a file are left out."""
    window, size, every, capacity = arguments.window, arguments.size, arguments.every, arguments.tokens
    options = {"window": window, "size": size, "every": every}
    found: dict[str, Built] = {"streaming_llm": sj.kv.preset("streaming_llm", window=window + size + every - 4)}
    found |= {name: sj.kv.preset(name, **options) for name in ("snapkv", "random")}
    for name, file in (("untrained", arguments.first), ("trained", arguments.kernels)):
        if file:
            found[f"lococo, {name}"] = sj.kv.preset("lococo", kernels=file, **options)
    found["dense"] = sj.kv.preset("dense", capacity=capacity)
    found["think, half of the keys' channels"] = sj.kv.preset("think", keep=0.5, capacity=capacity)
    found["streaming_llm, half of the tokens"] = sj.kv.preset("streaming_llm", window=capacity // 2 - 4)
    for name, file in (("principal", arguments.principal), ("trained", arguments.projections)):
        if file:
            given = {"projections": file, "capacity": capacity}
            found[f"matryoshka_kv, {name}, half of each head"] = sj.kv.preset(
                "matryoshka_kv", keys=0.5, values=0.5, **given
            )
            if any((layer.ranks < layer.keys.shape[2]).any() for layer in HeadProjections.load(file).layers):
                found[f"matryoshka_kv, {name}, ranks by search"] = sj.kv.preset("matryoshka_kv", **given)
    return found


def docstrings() -> str:
    """What the standard library's files say of themselves, without its help topics, which are read here."""
    found = []
    for name, text in stdlib_documents():
        if not name.startswith("pydoc_data"):
            parts = [node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED)]
            found += [said for said in map(ast.get_docstring, parts) if said and len(said) > 200]
    return "\n\n".join(found) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="write the text to train on there, and end")
    parser.add_argument("--model", help="the folder of the model that the files were trained for")
    parser.add_argument("--projections", help="what train.projections has written")
    parser.add_argument("--principal", help="the same with --steps=0")
    parser.add_argument("--kernels", help="what train.convolutions has written")
    parser.add_argument("--first", help="the same with --steps=0")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--skipped", type=int, default=192)
    parser.add_argument("--rows", type=int, default=4, help="stretches of the text, side by side")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--every", type=int, default=32)
    parser.add_argument("--caches", nargs="+", help="some of the rows, by name; all where it is not given")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.json")
    arguments = parser.parse_args()
    if arguments.text:
        arguments.text.write_text(docstrings())
        return
    if arguments.model is None:
        parser.error("give --model")
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    ids = tokenizer.encode("\n".join(topics.values()))[: arguments.rows * arguments.tokens]
    tokens = np.array(ids, np.int32).reshape(arguments.rows, arguments.tokens)
    model_name = Path(arguments.model).name
    about = {"tokens": arguments.tokens, "streams": arguments.rows}
    rows: list[dict] = []
    if arguments.output.exists():  # an interrupted run goes on, and another model's rows come behind
        done = json.loads(arguments.output.read_text())
        if {key: done.get(key) for key in about} == about:
            rows = [{"model": done.get("model"), **row} for row in done["rows"]]
    for name, cache in caches(arguments).items():
        there = (model_name, name) in [(row["model"], row["cache"]) for row in rows]
        if there or name not in (arguments.caches or [name]):
            continue
        state = sj.init_state(model, cache, len(tokens))
        row = {
            "model": model_name,
            "cache": name,
            "slots": max(kept.slots for kept in state.caches),
            "MB": state.cache_bytes / 1e6,
        }
        nats = np.asarray(sj.score(model, state, tokens, arguments.every)[1])[:, arguments.skipped :]
        row["nats"] = float(nats.mean(dtype=np.float64))
        row["perplexity"] = math.exp(row["nats"])
        rows.append(row)
        report(NAME, rows, arguments.output, **about)


if __name__ == "__main__":
    main()
