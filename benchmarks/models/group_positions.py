"""What an output costs a model that reads its source meanwhile, by the positions that both have, without training.

    python -m benchmarks.models.group_positions --model=FOLDER

SmolLM2-135M-Instruct in float32 shadows a text: it reads `wait` tokens of a docstring, then one for each token of the
output, which is the docstring again (wait-k). `nats` are an output token's on average. Positions "arrival" count tokens
in the order in which they come, source and output as one text that alternates; "groups" count each group by itself, the
output from 0, or from the source's length on, as a reader of the whole source would. Source tokens see the source
alone, or all that came before. A `wait` of "all" is a batch: the whole source first. Nothing was trained for this.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np

import streamjax as sj
from benchmarks.reporting import RESULTS, report
from streamjax.training.simultaneous import group_positions, grouped_nats, wait_k_rows

NAME = "models/group_positions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a source, and of an output")
    parser.add_argument("--waits", nargs="+", type=int, default=[3, 16])
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.json")
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    n, pairs, newline = arguments.length, [], tokenizer.encode("\n")
    for text in topics.values():
        ids = tokenizer.encode(text)[:n]
        if len(ids) == n and len(pairs) < arguments.pairs:
            pairs.append((ids, newline + ids))
    settings: list[tuple] = [
        (wait, first, mutual)
        for wait in arguments.waits
        for first, mutual in ((None, True), (None, False), (0, False), (0, True), (n, False))
    ]
    settings.append((None, None, False))
    about = {"pairs": len(pairs), "length": n}
    rows: list[dict] = []
    if arguments.output.exists():  # an interrupted run goes on
        found = json.loads(arguments.output.read_text())
        rows = found["rows"] if {key: found.get(key) for key in about} == about else []
    cost = jax.jit(grouped_nats)
    for wait, first, mutual in settings:
        row = {
            "wait": "all" if wait is None else wait,
            "positions": "arrival" if first is None else "groups",
            "output from": "" if first is None else first,
            "source sees": "all" if mutual else "source",
        }
        if any({key: done.get(key) for key in row} == row for done in rows):
            continue
        batch = wait_k_rows(pairs, wait, begin=len(newline), length=2 * n + len(newline))
        order = np.broadcast_to(np.arange(batch.tokens.shape[1], dtype=np.int32), batch.tokens.shape)
        place = order if first is None else group_positions(batch.outputs, first)
        nats = np.asarray(cost(model, batch, place, np.bool_(mutual)), np.float64)
        row["nats"] = float(nats.sum() / (batch.targets >= 0).sum())
        rows.append(row)
        report(NAME, rows, arguments.output, **about)


if __name__ == "__main__":
    main()
