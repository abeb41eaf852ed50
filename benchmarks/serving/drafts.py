"""Tokens that a pass of a model reads by who guesses, chains and trees, and what such passes cost.

    python -m benchmarks.serving.drafts --model=FOLDER --heads hydra.safetensors ppd.safetensors

SmolLM2-135M-Instruct in float32 answers greedily through its own chat template, as in benchmarks.serving.speculative: a
question (`chat`), a function that is to be copied with other names (`code`), a text that is to be said again
(`repeated`). `a pass`: tokens that each pass would read if every one had guesses, counted on the text that plain
decoding says, which is the text with guesses too. `nodes`: tokens that such a pass reads at most, prompt tokens
included. `cost`: CPU seconds of it and of its guesses over those of a pass over a single token, the median of turns in
one process. `over plain`: `a pass` by `cost`. Guessing pauses where that is below 1. `small cache` is the model itself
under 4 sinks and a window of 252 tokens, which it begins with the newest 128. Files are of `python -m
train.draft_heads`; the note says what they were trained on. Rows are written as they come, and a run that was ended
goes on behind them; it takes some 3 minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import Record, median_ratio
from benchmarks.serving.speculative import CACHE, GREEDY, answers, drafters
from streamjax.streaming.speculative import Drafter
from streamjax.streaming.speculative.drafter import Draws
from streamjax.streaming.speculative.heads import described
from streamjax.streaming.speculative.history import History
from streamjax.streaming.speculative.tree_verification import verify_tree_pass
from streamjax.streaming.speculative.two_phases import look_ahead_in_tree
from streamjax.streaming.speculative.verification import verify_pass
from streamjax.training.heads.prompting import prompts_beside

DRAFTERS = ("ngrams", "ngrams, 15 at most", "ngrams, 3 ways", "small cache")


@jax.jit
def hidden_states(model: sj.Decoder, tokens: jax.Array) -> jax.Array:
    return model.hidden(tokens[None])[0]


def tokens_a_pass(
    model: sj.Decoder, drafter: Drafter, prompt: list[int], text: list[int], hidden: jax.Array
) -> float:  # fmt: skip
    """Tokens of a text, which the model says behind a prompt, that each pass reads if all of them have guesses.

    Args:
      hidden: the model's states at the prompt and the text.
    """
    whole, ahead = np.array([*prompt, *text], np.int32), None
    if drafter.prompts is not None:
        ahead = _ahead(model, drafter.prompts, whole)
    at, passes, history = len(prompt), 0, History()
    while at < len(whole):
        behind = None if ahead is None else ahead[at - 1][None]
        draws = Draws(GREEDY, None, np.zeros(1, np.int32), hidden[at - 1][None], behind)
        history.extend(whole[history.total : at + 1])
        drafts = drafter.propose([history], [True], draws)
        node, at, passes = 0, at + 1, passes + 1
        for i in range(int(drafts.count[0])):
            parent = i if drafts.parents is None else int(drafts.parents[0, i])
            if parent == node and at < len(whole) and drafts.tokens[0, i] == whole[at]:
                node, at = i + 1, at + 1
    return len(text) / passes


def _ahead(model: sj.Decoder, prompts: jax.Array, whole: np.ndarray) -> jax.Array:
    """What the model computes at prompt tokens behind each token of a text, all of them in one pass: [T, M, E]."""
    length, most = len(whole), len(prompts)
    tree = prompts_beside(length, jnp.arange(length, dtype=jnp.int32)[None], most)
    state = sj.init_state(model, sj.kv.Cascade(sj.kv.Window(length + most)))
    x = jnp.concatenate((model.embed(jnp.asarray(whole[None])), jnp.tile(prompts, (length, 1))[None]), axis=1)
    tokens = jnp.pad(jnp.asarray(whole[None]), ((0, 0), (0, length * most)))
    return look_ahead_in_tree(model, state, tokens, tree, x)[0][0, length:].reshape(length, most, -1)


def one_pass(model: sj.Decoder, drafter: Drafter | None) -> Callable[[sj.StreamState], sj.StreamState]:
    """A pass over a single token where nobody guesses; else guesses by the drafter and a pass over so many."""
    zero, history = jnp.zeros(1, jnp.int32), [History([5, 6] * 20)]
    if drafter is None:
        return lambda state: (
            verify_pass(
                model, state, jnp.full((1, 1), 5, jnp.int32), jnp.ones(1, jnp.int32), None, zero, GREEDY, ()
            ).state
        )
    prompts, nodes = drafter.prompts, 1 + drafter.nodes
    ahead = None if prompts is None else jnp.zeros((1, *prompts.shape))

    def run(state: sj.StreamState) -> sj.StreamState:
        history[0].extend([5])  # a drafter that is a model has that to read
        drafts = drafter.propose(history, [True], Draws(GREEDY, None, np.zeros(1, np.int32), state.hidden, ahead))
        tokens = jnp.full((1, nodes), 5, jnp.int32)
        if drafts.parents is None:
            given = jnp.full(1, nodes, jnp.int32)
            return verify_pass(model, state, tokens, given, None, zero, GREEDY, ()).state
        parents = jnp.asarray(np.pad(drafts.parents, ((0, 0), (1, 0))).astype(np.int32))
        given = jnp.ones((1, nodes), bool)
        done = verify_tree_pass(
            model, state, tokens, parents, given, None, zero, 1 + drafter.length, GREEDY, (), prompts
        )  # fmt: skip
        return done.state

    return run


def costs(model: sj.Decoder, drafter: Drafter | None, plain: list[float], turns: int) -> list[float]:
    """CPU seconds of passes; of those over a single token as many are added to `plain`, in turns."""
    runs, spent = (one_pass(model, None), one_pass(model, drafter)), (plain, [])
    states = [sj.init_state(model, CACHE) for _ in runs]
    for turn in range(turns + 1):  # the first one compiles
        for i, run in enumerate(runs):
            start = time.process_time()
            states[i] = jax.block_until_ready(run(states[i]))
            if turn:
                spent[i].append(time.process_time() - start)
    return spent[1]


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
    states = {kind: hidden_states(model, np.array([*prompt, *text])) for kind, (prompt, text) in texts.items()}
    for name in [*(Path(file).stem for file in arguments.heads), *arguments.drafters]:
        left = [kind for kind in texts if not record.has(text=kind, **{"who guesses": name})]
        if not left:
            continue
        plain: list[float] = []
        cost = median_ratio(costs(model, known[name](), plain, arguments.turns), plain)
        for kind in left:
            row = {"who guesses": name, "text": kind, "nodes": known[name]().pass_width}
            row["a pass"] = round(tokens_a_pass(model, known[name](), *texts[kind], states[kind]), 2)
            record.add(row | {"cost": round(cost, 2), "over plain": round(row["a pass"] / cost, 2)})
    record.finish()


if __name__ == "__main__":
    main()
