"""How much of the attention the chosen pages hold: every index against the best choice there is, and against chance.

    python -m benchmarks.caches.selection_quality

The shipped byte-level model reads held-out text, 512 tokens at once, as in its training. The newest `--window` tokens
are always read; the older ones lie in pages, of which each index chooses `k` for every token and key head. The figure
is the share of the attention to all older tokens that falls on the chosen pages, a mean over layers, heads, tokens and
rows, where there are more pages than are chosen. "best" chooses by the attention itself, "newest" the newest pages.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

import streamjax as sj
from benchmarks.reporting import RESULTS, report
from streamjax.data import ByteTokenizer, corpus_text
from streamjax.kv.pages.indexes import Index, Mean, MinMax, Representative
from streamjax.models.mixers.attention import SequenceContext

MODEL = Path(__file__).parents[2] / "models" / "stdlib_byte"
INDEXES: dict[str, tuple[str, Index]] = {
    "MinMax()": ("Quest", MinMax()),
    "MinMax(parts=4)": ("LServe", MinMax(parts=4)),
    "Mean()": ("mean key", Mean()),
    "Mean(power=0.5)": ("DHSA", Mean(power=0.5)),
    "Representative(4)": ("InfLLM", Representative(4)),
}
Keys = Float[Array, "B K T D"]


def layer_keys(model: sj.Decoder, tokens: np.ndarray) -> list[tuple[Keys, Float[Array, "B K G T D"]]]:
    """Rotated keys and queries of every layer, over whole sequences."""
    context, x, found = SequenceContext.from_start(*tokens.shape), model.embed(jnp.asarray(tokens)), []
    for i in range(model.config.num_layers):
        q, k, _ = model.layer(i).project(x, context)
        heads = model.config.blocks[0].mixer.num_kv_heads
        found.append((jnp.swapaxes(k, 1, 2), rearrange(q, "b t (k g) d -> b k g t d", k=heads)))
        x, _ = model.layer(i).parallel(x, context)
    return found


def shares(
    keys: Keys, queries: Float[Array, "B K G T D"], scale: float, page: int, window: int, budgets: list[int]
) -> dict[str, dict[int, np.ndarray]]:
    """For each rule and budget: of each key head and token the share of the attention to older tokens it finds."""
    length = keys.shape[2]
    place = jnp.arange(length)
    logits = jnp.einsum("bkgtd,bksd->bkgts", queries, keys) * scale
    weights = jax.nn.softmax(jnp.where(place[:, None] >= place, logits, -jnp.inf), axis=-1)
    older = place[:, None] - (place // page + 1) * page + 1 >= window  # all of its page has left the window
    mass = jnp.where(older, weights, 0).mean(axis=2)  # what a group of heads reads, it reads together
    mass = rearrange(mass, "b k t (p s) -> b k t p s", s=page).sum(axis=-1)
    there = rearrange(older, "t (p s) -> t p s", s=page)[..., 0]
    near = (place[:, None] > place) & (place[:, None] - place < window)  # a token's attention from its window
    noted = rearrange(jnp.where(near, weights, 0).sum(axis=3), "b k g (p s) -> b (k g) p s", s=page)
    cut = rearrange(keys, "b k (p s) d -> b k p s d", s=page)
    flat = rearrange(queries, "b k g t d -> b k (t g) d")
    scores: dict[str, Array] = {"best": mass, "newest": jnp.broadcast_to(jnp.arange(cut.shape[2]), mass.shape)}
    scores["random"] = jax.random.uniform(jax.random.key(0), mass.shape)
    for name, (_, index) in INDEXES.items():
        summary = index.summarise(cut, jnp.ones((1, 1, *cut.shape[2:4]), bool), noted if index.needs_scores else None)
        found = rearrange(index.scores(summary, flat), "b k (t g) p -> b k t g p", t=length)
        scores[name] = found.max(axis=3)  # as `Pages(pool="max")` does
    results: dict[str, dict[int, np.ndarray]] = {}
    total = mass.sum(axis=-1)
    for name, score in scores.items():
        ranked = jnp.where(there, score, -jnp.inf)
        for budget in budgets:
            chosen = jax.lax.top_k(ranked, budget)[1]
            held = jnp.take_along_axis(mass, chosen, axis=-1).sum(axis=-1)
            enough = np.asarray(there.sum(axis=-1) > 2 * budget)
            results.setdefault(name, {})[budget] = np.asarray(held / total)[:, :, enough]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="contexts of 512 tokens")
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--window", type=int, default=64, help="newest tokens that are always read")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 4, 8], help="pages that are chosen")
    parser.add_argument("--output", type=Path, default=RESULTS / "caches/selection_quality.json")
    arguments = parser.parse_args()
    model = sj.load(MODEL)
    ids = np.asarray(ByteTokenizer().encode(corpus_text("test")[: 4 * 512 * arguments.rows]), np.int32)
    tokens = ids[: 511 * arguments.rows].reshape(arguments.rows, 511)
    tokens = np.concatenate((np.full((arguments.rows, 1), 256, np.int32), tokens), axis=1)
    found: dict[str, dict[int, list[np.ndarray]]] = {}
    for keys, queries in layer_keys(model, tokens):
        layer = shares(
            keys,
            queries,
            model.config.blocks[0].mixer.softmax_scale,
            arguments.page,
            arguments.window,
            arguments.budgets,
        )
        for name, by_budget in layer.items():
            for budget, share in by_budget.items():
                found.setdefault(name, {}).setdefault(budget, []).append(share)
    means = {name: {k: float(np.mean(np.stack(v))) for k, v in by.items()} for name, by in found.items()}
    order = sorted(means, key=lambda name: -means[name][arguments.budgets[-1]])
    rows = [
        {"choice": f"`{name}`" if name in INDEXES else name, "of": INDEXES[name][0] if name in INDEXES else ""}
        | {f"{k} pages": f"{100 * means[name][k]:.1f}%" for k in arguments.budgets}
        for name in order
    ]
    settings = {name: getattr(arguments, name) for name in ("rows", "page", "window")}
    report("caches/selection_quality", rows, arguments.output, arguments=settings)


if __name__ == "__main__":
    main()
