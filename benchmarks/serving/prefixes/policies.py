"""Which states of prefixes are kept: tokens that need not be read again, by policy, on traces of long sessions.

    python -m benchmarks.serving.prefixes.policies    # some 5 minutes; no model is run

The states are of a hybrid model of 7B (24 Mamba-2 layers and 4 of attention, d_model 4,096, 2406.07887), here under
windows of 4,096 tokens, so each takes the same bytes. Requests come as in Marconi's evaluation (2411.19379): sessions
begin at a steady rate, each turn's prompt is all that was said before and something new, and turns of sessions mix.
Lengths are drawn, not those of a data set. `chat`: some 20 turns, what is asked has 70 tokens on average, an answer
215; the next turn comes when it is typed at 90 words a minute. `agent`: a system prompt of 1,500 tokens that all
sessions share, a task, then up to 50 turns with what tools print, 700 tokens on average and sometimes thousands, 7.5
seconds apart; sessions end at 32,768 tokens. A turn finds the states that earlier turns left, in the order in which
they came.

`blocks` keeps a state behind each 256 tokens, and drops the one whose last use is longest ago. The others keep states
where a prompt ended or where two of them part. `recency` drops that one too. `work 1` adds the work that a state saves
per byte, `work 2` and `work 4` so many times of it, as Marconi does, which tunes the number while it runs. `passed
first` is recency, but states from which one way goes on, on which another state stands, go before all others; the
`engine` adds the work twice. Figures are percent of the prompts' tokens that were not read. `ideal` is a budget without
end.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tqdm import tqdm

from benchmarks.reporting import report
from streamjax.serving.prefix_tree import PrefixTree

CHUNK, BLOCK, LONGEST = 64, 256, 32_768
D_MODEL, SSM_LAYERS, ATTENTION_LAYERS, STATE, WINDOW = 4096, 24, 4, 128, 4096
LAYERS = SSM_LAYERS + ATTENTION_LAYERS
POLICIES: dict[str, tuple[float, bool]] = {  # alpha, and whether states that are passed go first
    "blocks": (0, False),
    "recency": (0, False),
    "work 1": (1, False),
    "work 2": (2, False),
    "work 4": (4, False),
    "passed first": (0, True),
    "engine": (2, True),
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a session asks at some second: everything before, and something new."""

    seconds: float
    prompt: Int32[np.ndarray, " T"]


@dataclasses.dataclass(frozen=True)
class HybridState:
    """Bytes of a state in bfloat16: of a recurrence its matrix and its convolution, of attention a window."""

    nbytes: int = 2 * (
        SSM_LAYERS * (2 * D_MODEL * STATE + 4 * (2 * D_MODEL + 2 * STATE)) + ATTENTION_LAYERS * 2 * WINDOW * D_MODEL
    )


def operations(start: int, stop: int) -> float:
    """Of reading tokens [start, stop): products of the layers and of the windows."""
    tokens = stop - start
    mixing = SSM_LAYERS * (12 * D_MODEL**2 + 16 * D_MODEL * STATE) + ATTENTION_LAYERS * 8 * D_MODEL**2
    pairs = _pairs(stop) - _pairs(start)
    return tokens * (mixing + LAYERS * 16 * D_MODEL**2) + ATTENTION_LAYERS * 4 * pairs * D_MODEL


def _pairs(tokens: int) -> float:
    """Of so many tokens with those before them in their windows."""
    full = min(tokens, WINDOW)
    return full * (full - 1) / 2 + (tokens - full) * WINDOW


def trace(kind: str, sessions: int, seed: int = 0) -> list[Turn]:
    """The turns of all sessions in the order in which they come."""
    draw, turns = np.random.default_rng(seed), []

    def ids(mean: float, spread: float) -> Int32[np.ndarray, " T"]:
        """So many tokens on average, by a lognormal distribution."""
        count = max(1, int(draw.lognormal(np.log(mean) - spread**2 / 2, spread)))
        return draw.integers(0, 1 << 30, count, np.int32)

    shared = ids(1500 if kind == "agent" else 60, 0)
    for session in range(sessions):
        said, seconds = np.concatenate((shared, ids(600, 0.7) if kind == "agent" else ids(70, 1.0))), 1.0 * session
        for _ in range(50 if kind == "agent" else 10 + draw.geometric(0.1)):
            if len(said) > LONGEST:
                break
            turns.append(Turn(seconds, said))
            if kind == "agent":
                new, wait = ids(700, 1.3), float(draw.poisson(7.5))
                said = np.concatenate((said, ids(150, 0.5), new))
            else:
                new = ids(70, 1.0)
                said, wait = np.concatenate((said, ids(215, 0.7), new)), 0.75 * len(new) / 1.5
            seconds += wait
    return sorted(turns, key=lambda turn: turn.seconds)


def replayed(turns: list[Turn], budget: int, policy: str) -> float:
    """The share of tokens that are not read again."""
    alpha, passed_first = POLICIES[policy]
    tree = PrefixTree(CHUNK, budget, operations, alpha, passed_first, most_tokens=1 << 62)
    state, hit, whole = HybridState(), 0, 0
    for turn in turns:
        prompt = turn.prompt
        tree.add(prompt)
        if policy == "blocks":
            for depth in range(BLOCK, len(prompt), BLOCK):
                tree.add(prompt[:depth])
        depth, _ = tree.match(prompt)
        hit, whole = hit + depth, whole + len(prompt)
        step = BLOCK if policy == "blocks" else CHUNK
        for place in range(depth - depth % step + step, len(prompt) + 1, step):
            if tree.wants(prompt, place):
                tree.keep(prompt, place, state)
    return hit / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--states", type=int, nargs="+", default=[10, 20, 40], help="that the budget holds")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    one, rows = HybridState().nbytes, []
    for kind in ("chat", "agent"):
        turns = trace(kind, arguments.sessions)
        ideal = replayed(turns, 1 << 62, "recency")
        for states in tqdm(arguments.states, desc=kind):
            row = {"trace": f"{kind}, {len(turns):,} requests", "states": states, "GB": round(states * one / 1e9, 1)}
            row |= {policy: round(100 * replayed(turns, states * one, policy), 1) for policy in POLICIES}
            rows.append(row | {"ideal": round(100 * ideal, 1)})
            print(rows[-1], flush=True)
    report("serving/prefixes/policies", rows, arguments.output, sessions=arguments.sessions)


if __name__ == "__main__":
    main()
