"""Guesses in the engine: CPU time a token and passes, by how many requests run at once.

    python -m benchmarks.serving.guesses --model=FOLDER --heads hydra.safetensors    # 2 idle cores: some 15 minutes

SmolLM2-135M-Instruct in float32 under 4 sinks and a window of 508 tokens answers greedily through its own template: all
requests are a text that is to be said again (`repeated`), or questions (`chat`), or half of both (`mixed`), and come at
one moment. The engine has as many rows as requests come, and is new each time: it has to find out what passes take, and
rows whose answers are over stay empty. Who guesses are n-grams, and trained heads by the names of their files (`python
-m train.draft_heads`; the note says what they were trained on). Guesses rest where they cost more than they bring;
`always` they do not (`sj.Engine(draft_cost=1)`). `a pass`: tokens of a row that runs, in the mean. `right`: of the
tokens that were guessed and read. `CPU ms`: of all threads, a token, prompts included, the median of the turns; `over
plain`: that of the engine without guesses by these, the median of turns in one process. `same`: answers that are equal
to those without guesses. Rows are written as they come, and a run that was ended goes on behind them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import streamjax as sj
from benchmarks.reporting import Record, median_ratio
from benchmarks.serving.speculative import ASKED
from streamjax.data.text.chat_templates import encode_chat
from streamjax.serving.requests import Request, Sampling
from streamjax.streaming.speculative import Drafter, trained_drafter
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
    parser.add_argument("--heads", nargs="+", default=[], help="files of trained heads, which guess too")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model, dtype="float32"), sj.load_tokenizer(arguments.model)
    drafters: dict[str, tuple[Callable[[], Drafter], float | None]] = {
        "n-grams": (partial(sj.NGrams, length=arguments.length), None)
    }
    for file in arguments.heads:
        heads = partial(trained_drafter, model, file)
        drafters |= {Path(file).stem: (heads, None), f"{Path(file).stem}, always": (heads, 1)}

    def prompt(question: str) -> tuple[int, ...]:
        return tuple(encode_chat(tokenizer, [{"role": "user", "content": question}]))

    said, chats = prompt(ASKED["repeated"]), [prompt(question) for question in QUESTIONS]
    note = " ".join([f"N-grams guess {arguments.length} tokens at most.", *map(described, arguments.heads)])
    settings = {"model": Path(arguments.model).name, "tokens": arguments.tokens, "turns": arguments.turns}
    record = Record("serving/guesses", arguments.output, note=note, **settings)
    for rows in arguments.rows:
        asked = {"repeated": [said] * rows, "chat": chats[:rows]}
        asked |= {"mixed": [said] * (rows // 2) + chats[: rows - rows // 2]} if rows > 1 else {}
        for who, (drafter, cost) in drafters.items():
            left = {k: v for k, v in asked.items() if not record.has(rows=rows, text=k, **{"who guesses": who})}
            if not left:
                continue
            make = partial(engine_of, model, tokenizer, rows)
            engines = {"plain": make, "guesses": partial(make, drafter, cost)}
            for one in engines.values():
                one().warm_up()
            for kind, prompts in left.items():
                row = {"who guesses": who, "rows": rows, "text": kind}
                record.add(row | compared(engines, prompts, arguments.tokens, arguments.turns))
    record.finish()


def engine_of(
    model: sj.Decoder,
    tokenizer: sj.Tokenizer,
    rows: int,
    drafter: Callable[[], Drafter] | None = None,
    cost: float | None = None,
) -> sj.Engine:
    """An engine with a drafter of its own."""
    draft = None if drafter is None else drafter()
    return sj.Engine(model, tokenizer, CACHE, rows=rows, prefix_bytes=0, draft=draft, draft_cost=cost)


def compared(
    engines: dict[str, Callable[[], sj.Engine]], prompts: list[tuple[int, ...]], tokens: int, turns: int
) -> dict[str, object]:
    """What an engine with `guesses` does beside a `plain` one, in turns; new ones each time, which know no answers."""
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(turns):
        found, steps = {}, {}
        for name, make in engines.items():
            engine = make()
            found[name], seconds, steps[name] = serve(engine, prompts, tokens)
            spent[name].append(seconds)
    stats = engine.stats()
    return {
        "a pass": round(steps["plain"] / steps["guesses"], 2),
        "right": f"{stats.accepted_tokens} of {stats.guessed_tokens}",
        "same": f"{sum(one == other for one, other in zip(*found.values(), strict=True))} of {len(prompts)}",
        "CPU ms": round(1e3 * statistics.median(spent["guesses"]) / (len(prompts) * tokens), 1),
        "over plain": round(median_ratio(spent["plain"], spent["guesses"]), 2),
    }


if __name__ == "__main__":
    main()
