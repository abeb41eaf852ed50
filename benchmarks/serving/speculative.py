"""Speculative decoding against plain decoding: tokens a pass and CPU seconds a token, by who guesses.

    python -m benchmarks.serving.speculative --model=FOLDER    # 2 idle cores: some 5 minutes

SmolLM2-135M-Instruct in float32 answers greedily through its own chat template, under 4 sinks and a window of 1,020
tokens, and under pages that change with every token (`--caches`): a question (`chat`), a function that is to be
copied with other names (`code`), a text that is to be said again (`repeated`). An answer ends with the end of the
turn, or after `--tokens`. `a pass`: tokens that it reads in a pass of the model. `right`: of the tokens that were
guessed. `CPU ms`: of all threads, a token, the median of the turns; `over plain`: plain decoding's CPU seconds by
these, the median of turns in one process. `same`: whether all tokens are those of plain decoding. The prompt is read
before. The note says what a pass costs by its width: where a pass over 8 tokens takes twice as long as one over a
single token, 2 tokens a pass gain nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import median_ratio, report
from streamjax.data.text.chat_templates import encode_chat
from streamjax.kv.cache import Cache
from streamjax.streaming.generate import BLOCK
from streamjax.streaming.speculative import Drafter, Retrieval, trained_drafter
from streamjax.streaming.speculative.decoding import Rounds, speculate
from streamjax.streaming.speculative.history import History

CACHE = sj.kv.preset("streaming_llm", sinks=4, window=1020)
CACHES = ("streaming_llm:sinks=4,window=1020", "quest:sinks=4,window=32,capacity=2048,page=16,top_k=8")
GREEDY = sj.Sampler(temperature=0)
PASSES = 6  # of each width, for the note
TEXT = (
    "The harbour was quiet that morning. Two fishing boats came in with the tide, and their crews carried the crates "
    "to the market hall, where the buyers were waiting. By noon the hall was empty again, and the gulls had the quay. "
    "In the afternoon the wind turned to the west. The harbour master walked along the wall, looked at the sky, and "
    "told the crews to tie their boats twice. Nobody went out again. They sat in the small cafe by the lighthouse, "
    "drank tea, and talked about the summer when the fish had come so close to the shore that the children caught them "
    "with their hands."
)
CODE = """def total(prices, taxes):
    result = 0
    for price, tax in zip(prices, taxes):
        result = result + price
        result = result + price * tax
    return result"""
ASKED = {
    "chat": "Why is the sky blue? Explain it to a child.",
    "code": f"Write this Python function again, with the name `result` changed to `amount`:\n\n{CODE}",
    "repeated": f"Repeat this text word for word:\n\n{TEXT}",
}


def drafters(model: sj.Decoder, heads: Sequence[str] = ()) -> dict[str, Callable[[], Drafter]]:
    """Who guesses, by name; trained heads by the names of their files."""
    small = sj.kv.preset("streaming_llm", sinks=4, window=764)
    itself = partial(sj.SmallModel, model=model, cache=small, context=128)
    return {
        "ngrams": sj.NGrams,
        "ngrams, 15 at most": partial(sj.NGrams, length=15),
        "ngrams, 3 ways": partial(sj.NGrams, length=5, branches=3),
        "small cache": itself,
        "retrieved": partial(itself, retrieval=Retrieval(chunks=8, size=64, asked=64)),
        "staged": lambda: itself(drafter=sj.NGrams()),
        **{Path(file).stem: partial(trained_drafter, model, file) for file in heads},
    }


def answers(
    model: sj.Decoder, tokenizer: sj.Tokenizer, most: int, cache: Cache | Sequence[Cache] = CACHE
) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and greedy answer to each question: at most so many tokens, the last of them the end of the turn."""
    return {kind: answered(model, tokenizer, question, most, cache) for kind, question in ASKED.items()}


def answered(
    model: sj.Decoder, tokenizer: sj.Tokenizer, question: str, most: int, cache: Cache | Sequence[Cache] = CACHE
) -> tuple[list[int], list[int]]:
    """Prompt and greedy answer to a question."""
    ends = {*tokenizer.eos_ids, *model.config.eos_token_ids}
    prompt = encode_chat(tokenizer, [{"role": "user", "content": question}])
    state = sj.init_state(model, cache)
    text = sj.generate(model, state, [prompt], max_new_tokens=most, sampler=GREEDY, stop_tokens=tuple(ends))[1]
    said = np.asarray(text)[0].tolist()
    return prompt, said[: next((i + 1 for i, token in enumerate(said) if token in ends), most)]


def pass_costs(model: sj.Decoder, widths: list[int]) -> str:
    """CPU milliseconds of a pass over so many tokens, logits and the choice included."""
    costs = []
    for width in widths:
        state, spent = sj.init_state(model, CACHE), []
        chunk = np.full((1, width), 5, np.int32)
        for _ in range(PASSES + 1):
            start = time.process_time()
            state, logits = sj.step(model, state, chunk)
            jax.block_until_ready(logits)
            spent.append(time.process_time() - start)
        costs.append(f"{width} token{'s' * (width > 1)} {1e3 * min(spent[1:]):.0f}")
    return f"CPU milliseconds of a pass, the least of {PASSES}: {', '.join(costs)}."


def compared(
    model: sj.Decoder,
    cache: Cache,
    prompt: list[int],
    expected: list[int],
    drafters: dict[str, Callable[[], Drafter]],
    turns: int,
) -> Iterator[dict[str, object]]:
    """A row for plain decoding and for each who guesses, by turns, of one answer."""
    tokens = len(expected)
    begun = sj.read(model, sj.init_state(model, cache), [prompt])
    spent: dict[str, list[float]] = {name: [] for name in ("plain", *drafters)}
    wall: dict[str, list[float]] = {name: [] for name in spent}
    figures = {}
    for turn in range(turns + 1):  # the first one compiles
        for name in spent:
            start = time.process_time(), time.perf_counter()
            state = jax.tree.map(jnp.copy, begun)
            if name == "plain":
                jax.block_until_ready(sj.generate(model, state, [[]], max_new_tokens=tokens, sampler=GREEDY)[1])
            else:
                rounds = Rounds(
                    model, state, drafters[name](), [History(prompt)],
                    sampler=GREEDY, key=None, index=np.zeros(1, np.int64), block=BLOCK,
                )  # fmt: skip
                pieces = [new[0] for _, new in speculate(rounds, tokens, (), BLOCK)]
                figures[name] = (rounds, np.concatenate(pieces).tolist() == expected)
            if turn:
                spent[name].append(time.process_time() - start[0])
                wall[name].append(time.perf_counter() - start[1])
    for name, seconds in spent.items():
        row = {"tokens": tokens, "who guesses": name, "a pass": 1.0, "right": "", "same": ""}
        if name != "plain":
            rounds, same = figures[name]
            row["a pass"] = round(tokens / rounds.passes, 2)
            row["right"] = f"{rounds.right} of {rounds.guessed}"
            row["same"] = "yes" if same else "no"
        row["CPU ms"] = round(1e3 * statistics.median(seconds) / tokens, 1)
        row["ms"] = round(1e3 * statistics.median(wall[name]) / tokens, 1)
        row["over plain"] = round(median_ratio(spent["plain"], seconds), 2)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--caches", nargs="+", default=CACHES)
    parser.add_argument("--drafters", nargs="+", help="some of them, by name", default=["ngrams", "ngrams, 15 at most"])
    parser.add_argument("--heads", nargs="+", default=[], help="files of trained heads, which guess too")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model, dtype="float32"), sj.load_tokenizer(arguments.model)
    arguments.drafters += [Path(file).stem for file in arguments.heads]
    known, rows = drafters(model, arguments.heads), []
    for words in arguments.caches:
        name, options = sj.kv.parse_preset(words)
        cache = sj.kv.preset(name, **options)
        for kind, (prompt, expected) in answers(model, tokenizer, arguments.tokens, cache).items():
            guessing = {name: known[name] for name in arguments.drafters}
            for row in compared(model, cache, prompt, expected, guessing, arguments.turns):
                rows.append({"cache": name, "text": kind, **row})
                print(rows[-1], flush=True)
    note = pass_costs(model, [1, 2, 8, 16])
    report("serving/speculative", rows, arguments.output, note=note, tokens=arguments.tokens, turns=arguments.turns)


if __name__ == "__main__":
    main()
