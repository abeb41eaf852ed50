"""Guesses in the engine: CPU time a token and passes, by how many requests run at once.

    python -m benchmarks.serving.guesses --model=FOLDER    # 2 cores: some 10 minutes
    python -m benchmarks.serving.guesses --model=FOLDER --heads=FILE --output=out/heads.json   # of train.draft_heads

SmolLM2-135M-Instruct in float32 under 4 sinks and a window of 508 tokens answers greedily through its own template:
all requests are a text that is to be said again (`repeated`), or questions (`chat`), or half of both (`mixed`), and
come at one moment. The engine has as many rows as requests come. `a pass`: tokens of a row that runs, in the mean.
`right`: of the tokens that were guessed and read. `CPU ms`: of all threads, a token, prompts included, the median of
the turns; `over plain`: that of the engine without guesses by these, the median of turns in one process. `same`:
answers that are equal to those without guesses. Rows are written as they come, and a run that was ended goes on behind
them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import streamjax as sj
from benchmarks.reporting import Record, median_ratio
from benchmarks.serving.speculative import ASKED
from streamjax.data.text.chat_templates import encode_chat
from streamjax.serving.requests import Request, Sampling
from streamjax.streaming.speculative import trained_drafter
from streamjax.streaming.speculative.heads import described

CACHE = sj.kv.preset("streaming_llm", sinks=4, window=508)
QUESTIONS = (
    ASKED["chat"], "What is a heap in computer science?", "How do bees make honey?", "Who was Marie Curie?",
    "Write three tips for baking bread.", "Why do ships float?", "What does a compiler do?", "Describe a harbour.",
)  # fmt: skip


def serve(engine: sj.Engine, prompts: list[tuple[int, ...]], tokens: int) -> tuple[list[list[int]], float, int]:
    """The answers, the CPU seconds that they took, and the iterations."""
    tickets = [engine.submit(Request(prompt, tokens, Sampling(temperature=0))) for prompt in prompts]
    start, steps = time.process_time(), 1
    while engine.step():
        steps += 1
    spent = time.process_time() - start
    return [[token for event in ticket.events() for token in event.tokens] for ticket in tickets], spent, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--length", type=int, default=7, help="of guesses by n-grams")
    parser.add_argument("--heads", type=Path, help="trained drafts that guess, and not n-grams")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model, dtype="float32"), sj.load_tokenizer(arguments.model)
    drafter = None if arguments.heads is None else trained_drafter(model, arguments.heads)

    def prompt(question: str) -> tuple[int, ...]:
        return tuple(encode_chat(tokenizer, [{"role": "user", "content": question}]))

    said, chats = prompt(ASKED["repeated"]), [prompt(question) for question in QUESTIONS]
    who = f"n-grams, {arguments.length} at most" if arguments.heads is None else arguments.heads.stem
    settings = {"model": Path(arguments.model).name, "tokens": arguments.tokens, "turns": arguments.turns}
    record = Record("serving/guesses", arguments.output, who=who, **settings)
    for rows in arguments.rows:
        asked = {"repeated": [said] * rows, "chat": chats[:rows]}
        asked |= {"mixed": [said] * (rows // 2) + chats[: rows - rows // 2]} if rows > 1 else {}
        asked = {kind: prompts for kind, prompts in asked.items() if not record.has(rows=rows, text=kind)}
        if not asked:
            continue
        engines = {}
        for name, draft in (("plain", None), ("guesses", drafter or sj.NGrams(length=arguments.length))):
            engines[name] = sj.Engine(model, tokenizer, CACHE, rows=rows, prefix_bytes=0, draft=draft)
            engines[name].warm_up()
        for kind, prompts in asked.items():
            spent: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(arguments.turns):
                found, steps, before = {}, {}, engines["guesses"].stats()
                for name, engine in engines.items():
                    found[name], seconds, steps[name] = serve(engine, prompts, arguments.tokens)
                    spent[name].append(seconds)
            after = engines["guesses"].stats()
            record.add({
                "rows": rows, "text": kind,
                "a pass": round(steps["plain"] / steps["guesses"], 2),
                "right": f"{after.accepted_tokens - before.accepted_tokens} of "
                f"{after.guessed_tokens - before.guessed_tokens}",
                "same": sum(one == other for one, other in zip(*found.values(), strict=True)),
                "CPU ms": round(1e3 * statistics.median(spent["guesses"]) / (rows * arguments.tokens), 1),
                "over plain": round(median_ratio(spent["plain"], spent["guesses"]), 2),
            })  # fmt: skip
    note = f"Guesses by {who}." if arguments.heads is None else described(str(arguments.heads))
    record.finish(note=note)


if __name__ == "__main__":
    main()
