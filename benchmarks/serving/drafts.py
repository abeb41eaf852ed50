"""Tokens that a pass of a model reads by who guesses, chains and trees, and what such passes cost.

    python -m benchmarks.serving.drafts --model=FOLDER --heads hydra.safetensors ppd.safetensors

SmolLM2-135M-Instruct in float32 answers greedily through its own chat template, as in benchmarks.serving.speculative: a
question (`chat`), a function that is to be copied with other names (`code`), a text that is to be said again
(`repeated`), and a question behind 3,000 tokens of Python's help that answer it (`long`, under a window of 4,092).
`a pass`: tokens that each pass would read if every one had guesses, counted on the text that plain decoding says, which
is the text with guesses too. `nodes`: tokens that such a pass reads at most, prompt tokens included. `cost`: CPU
seconds of it (the median of turns) and of its guesses (the mean on that text, read a second time) over those of a pass
over a single token. `over plain`: `a pass` by `cost`. Guessing pauses where that is below 1. `small cache` is the model
itself under 4 sinks and a window of 764 tokens, which it begins with the newest 128; `retrieved`: with 8 chunks of 64
tokens before them that have most to do with those (RAPID); `staged`: n-grams guess for it. Files are of `python -m
train.draft_heads`; the note says what they were trained on. Rows are written as they come, and a run that was ended
goes on behind them; it takes some 10 minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import Record, median_ratio
from benchmarks.serving.speculative import CACHE, GREEDY, answered, answers, drafters
from streamjax.kv.cache import Cache
from streamjax.streaming.speculative import Drafter
from streamjax.streaming.speculative.drafter import Draws
from streamjax.streaming.speculative.heads import described
from streamjax.streaming.speculative.history import History
from streamjax.streaming.speculative.tree_verification import verify_tree_pass
from streamjax.streaming.speculative.two_phases import look_ahead_in_tree
from streamjax.streaming.speculative.verification import verify_pass
from streamjax.training.heads.prompting import prompts_beside

DRAFTERS = ("ngrams", "ngrams, 15 at most", "ngrams, 3 ways", "small cache", "retrieved", "staged")
LONG = sj.kv.preset("streaming_llm", sinks=4, window=4092)
HELP = topics["execmodel"][:13_500]
ASKED_OF_HELP = "How does Python find what a name in a code block refers to, and what happens if it is not found?"


def cache_of(kind: str) -> Cache | tuple[Cache, ...]:
    return LONG if kind == "long" else CACHE


@jax.jit
def hidden_states(model: sj.Decoder, tokens: jax.Array) -> jax.Array:
    return model.hidden(tokens[None])[0]


def tokens_a_pass(
    model: sj.Decoder, drafter: Drafter, prompt: list[int], text: list[int], hidden: jax.Array
) -> tuple[float, float]:  # fmt: skip
    """Tokens of a text, which the model says behind a prompt, that each pass reads if all of them have guesses.

    Args:
      hidden: the model's states at the prompt and the text.

    Returns:
      Also the CPU seconds of the guesses of one pass, in the mean of those behind the first.
    """
    whole, ahead = np.array([*prompt, *text], np.int32), None
    if drafter.prompts is not None:
        ahead = _ahead(model, drafter.prompts, whole, len(prompt) - 1)
    at, spent, history = len(prompt), list[float](), History()
    while at < len(whole):
        behind = None if ahead is None else ahead[at - len(prompt)][None]
        draws = Draws(GREEDY, None, np.zeros(1, np.int32), hidden[at - 1][None], behind)
        history.extend(whole[history.total : at + 1])
        start = time.process_time()
        drafts = drafter.propose([history], [True], draws)
        jax.block_until_ready(drafts.tokens)
        spent.append(time.process_time() - start)
        node, at = 0, at + 1
        for i in range(int(drafts.count[0])):
            parent = i if drafts.parents is None else int(drafts.parents[0, i])
            if parent == node and at < len(whole) and drafts.tokens[0, i] == whole[at]:
                node, at = i + 1, at + 1
    return len(text) / len(spent), float(np.mean(spent[1:]))


def _ahead(model: sj.Decoder, prompts: jax.Array, whole: np.ndarray, first: int) -> jax.Array:
    """What the model computes at prompt tokens behind the tokens of a text from the first on: [T - first, M, E]."""
    length, most = len(whole), len(prompts)
    places = jnp.arange(first, length, dtype=jnp.int32)
    tree = prompts_beside(length, places[None], most)
    state = sj.init_state(model, sj.kv.Cascade(sj.kv.Window(length + most)))
    x = jnp.concatenate((model.embed(jnp.asarray(whole[None])), jnp.tile(prompts, (len(places), 1))[None]), axis=1)
    tokens = jnp.pad(jnp.asarray(whole[None]), ((0, 0), (0, len(places) * most)))
    return look_ahead_in_tree(model, state, tokens, tree, x)[0][0, length:].reshape(len(places), most, -1)


def one_pass(model: sj.Decoder, drafter: Drafter | None) -> Callable[[sj.StreamState], sj.StreamState]:
    """A pass over a single token where nobody guesses, else over as many as the drafter guesses at most."""
    zero, width = jnp.zeros(1, jnp.int32), 1 if drafter is None else 1 + drafter.nodes
    tokens, given = jnp.full((1, width), 5, jnp.int32), jnp.full(1, width, jnp.int32)
    if drafter is None or not drafter.guesses_trees:
        return lambda state: verify_pass(model, state, tokens, given, None, zero, GREEDY, ()).state
    behind = jnp.clip(jnp.arange(width, dtype=jnp.int32)[None] - 1, 0, drafter.length - 1)
    given, levels, prompts = jnp.ones((1, width), bool), 1 + drafter.length, drafter.prompts
    return lambda state: (
        verify_tree_pass(model, state, tokens, behind, given, None, zero, levels, GREEDY, (), prompts).state
    )


def costs(
    model: sj.Decoder, drafter: Drafter, cache: Cache | Sequence[Cache], turns: int
) -> tuple[list[float], list[float]]:
    """CPU seconds of passes with guesses, and of those over a single token, in turns."""
    runs, spent = (one_pass(model, drafter), one_pass(model, None)), (list[float](), list[float]())
    states = [sj.init_state(model, cache) for _ in runs]
    for turn in range(turns + 1):  # the first one compiles
        for i, run in enumerate(runs):
            start = time.process_time()
            states[i] = jax.block_until_ready(run(states[i]))
            if turn:
                spent[i].append(time.process_time() - start)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--drafters", nargs="*", help="some of them, by name", default=[*DRAFTERS])
    parser.add_argument("--heads", nargs="+", default=[], help="files of trained heads, which guess too")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model, dtype="float32"), sj.load_tokenizer(arguments.model)
    known = drafters(model, arguments.heads)
    note = " ".join(described(file) for file in arguments.heads)
    settings = {"model": Path(arguments.model).name, "tokens": arguments.tokens, "turns": arguments.turns}
    record = Record("serving/drafts", arguments.output, note=note, **settings)
    texts = answers(model, tokenizer, arguments.tokens)
    texts["long"] = answered(model, tokenizer, f"{HELP}\n\n{ASKED_OF_HELP}", arguments.tokens, LONG)
    states = {kind: hidden_states(model, np.array([*prompt, *text])) for kind, (prompt, text) in texts.items()}
    for name in [*(Path(file).stem for file in arguments.heads), *arguments.drafters]:
        left = [kind for kind in texts if not record.has(text=kind, **{"who guesses": name})]
        if not left:
            continue
        passes = {cache: costs(model, known[name](), cache, arguments.turns) for cache in {*map(cache_of, left)}}
        for kind in left:
            read, single = passes[cache_of(kind)]
            for _ in range(2):  # the first time compiles
                tokens, guessing = tokens_a_pass(model, known[name](), *texts[kind], states[kind])
            cost = median_ratio(read, single) + guessing / statistics.median(single)
            row = {"who guesses": name, "text": kind, "nodes": known[name]().pass_width, "a pass": round(tokens, 2)}
            record.add(row | {"cost": round(cost, 2), "over plain": round(tokens / cost, 2)})
    record.finish()


if __name__ == "__main__":
    main()
