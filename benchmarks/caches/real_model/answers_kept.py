"""Which heads still hold the answer: caches of one eighth of a dense one's bytes, when the question comes.

    python -m benchmarks.caches.real_model.answers_kept --model=FOLDER        # ten minutes on 2 cores
    python -m benchmarks.caches.real_model.answers_kept --model=FOLDER --cache=snapkv:kernel=7

The caches, the tasks and the first examples are those of `equal_bytes`. A cell is the share of all heads (30 layers of
three) that hold every token of the answer, which SmolLM2 writes as one token a digit; `any of it` is the share that
hold at least one, the mean over tasks. `tokens` is what a head holds of the context, on average. It is not the number
of heads alone that decides: in `niah_single_1`, `finch` and `kvzip` leave the answer whole in about as many heads, and
the model gives it to 2 and to 8 of 8 questions.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import jax

import streamjax as sj
from benchmarks.caches.beside_kvpress.ours import places
from benchmarks.caches.real_model.equal_bytes import BUDGET, TASKS
from benchmarks.reporting import report
from streamjax.commands.leaderboard import make_caches, make_tasks
from streamjax.data.recall.chat_frames import chat_frame
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.evaluation.context_states import ContextReader, Encoded

LENGTH = 1024
CACHES = (
    "streaming_llm", "snapkv", "h2o", "tova", "finch", "finch:codec=int4", "knorm", "keydiff", "kvzip",
    "kvzip:codec=int4", "leverage", "leverage:codec=int4",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--cache", action="append", help="a preset with its options; may be repeated")
    parser.add_argument("--examples", type=int, default=4, help="of each task")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model, dtype="bfloat16"), sj.load_tokenizer(arguments.model)
    tasks, _ = make_tasks(TASKS, LENGTH, arguments.examples, 0, tokenizer, chat_frame(tokenizer), None)
    room = max(encoded.room for examples in tasks.values() for encoded in examples)
    caches, refused = make_caches(model, arguments.cache or CACHES, (), (BUDGET,), LENGTH, room, "prompt")
    for label, why in refused.items():
        print(f"left out: {label}: {why}")
    reader = ContextReader(model, tokenizer, "prompt", keep_bytes=8 * 2**30)
    rows = []
    for _, name, _, cache in caches[1:]:
        found = {task: [held(reader, cache, encoded) for encoded in examples] for task, examples in tasks.items()}
        every = [one for each in found.values() for one in each]
        rows.append(
            {
                "cache": name,
                "tokens": f"{statistics.fmean(one['tokens'] for one in every):.0f}",
                **{task: f"{statistics.fmean(one['all'] for one in each):.2f}" for task, each in found.items()},
                "any of it": f"{statistics.fmean(one['any'] for one in every):.2f}",
            }
        )
        print(rows[-1], flush=True)
        jax.clear_caches()
    report("caches/real_model/answers_kept", rows, arguments.output, budget=BUDGET, examples=arguments.examples)


def held(reader: ContextReader, cache: Any, encoded: Encoded) -> dict[str, float]:
    """How many tokens a head holds on average, and the shares of heads that hold all and any of the answer's."""
    state, _ = reader.read(cache, [encoded])
    answer = answer_places(reader.tokenizer, encoded)
    heads = [
        set(head)
        for block, kept, layer in zip(reader.model.config.blocks, state.caches, state.layers, strict=True)
        for head in places(kept, layer, block.mixer.num_kv_heads)
    ]
    return {
        "tokens": statistics.fmean(map(len, heads)),
        "all": statistics.fmean(answer <= head for head in heads),
        "any": statistics.fmean(bool(answer & head) for head in heads),
    }


def answer_places(tokenizer: Tokenizer, encoded: Encoded) -> set[int]:
    """Places in the context of the tokens that spell the first answer."""
    pieces = [tokenizer.decode([token]) for token in encoded.context]
    text, answer = "".join(pieces), encoded.example.turns[0].answers[0]
    begin = text.index(answer)
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    return {i for i, end in enumerate(ends) if end > begin and end - len(pieces[i]) < begin + len(answer)}


if __name__ == "__main__":
    main()
