"""Verification of token trees: the model reads several ways to go on in one pass, and goes the one that it would go.

Each node sees the stream and what stands above it (`attention.token_tree`), and the model's own choice behind it is
made with the random number that plain decoding uses at that place. From the root on, the child that is that choice is
read next, until no child is. So what comes out is, token for token, that of plain decoding, as with single guesses.
Nothing is lost by that against sampling from what is left of the distribution (SpecInfer, 2305.09781; SpecTr,
2310.15141): k guesses behind a token are certain before it is drawn, so the most that any rule can keep is their
probability together, and that is how often the choice is one of them.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamjax.attention.token_tree import TokenTree
from streamjax.models.decoder import Decoder
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.speculative.choosing import choose, seen_in_tree
from streamjax.streaming.speculative.two_phases import (
    allowed_levels,
    look_ahead_in_tree,
    take_in_first,
    waiting_along,
)
from streamjax.streaming.speculative.verification import Verified
from streamjax.streaming.state import StreamState


def chosen_path(
    tree: TokenTree,
    tokens: Int32[Array, "B N"],
    chosen: Int32[Array, "B N"],
    goes_on: Bool[Array, "B N"],
) -> tuple[Int32[Array, "B D"], Int32[Array, " B"]]:
    """The nodes that a model reads, from the root on, and how many; those behind are padding.

    Args:
      tree, tokens: what was guessed.
      chosen: the model's choice behind each node.
      goes_on: whether anything may be read behind a node.
    """
    rows = jnp.arange(tokens.shape[0])
    root = jnp.arange(tokens.shape[1]) == 0
    at, alive, path = jnp.zeros_like(rows), tree.given[:, 0], []
    count = jnp.zeros_like(rows)
    for _ in range(tree.levels):
        path.append(at)
        count += alive
        fits = tree.given & (tree.parent == at[:, None]) & (tokens == chosen[rows, at][:, None]) & ~root
        alive &= goes_on[rows, at] & jnp.any(fits, axis=1)
        at = jnp.where(alive, jnp.argmax(fits, axis=1), at)
    return jnp.stack(path, axis=1).astype(jnp.int32), count.astype(jnp.int32)


@partial(jax.jit, static_argnames=("levels", "sampler", "stop"), donate_argnames="state")
def verify_tree_pass(
    model: Decoder,
    state: StreamState,
    tokens: Int32[Array, "B N"],
    parents: Int32[Array, "B N"],
    given: Bool[Array, "B N"],
    key: Array | None,
    index: Int32[Array, " B"],
    levels: int,
    sampler: Sampler,
    stop: tuple[int, ...],
    prompts: Float[Array, "M E"] | None = None,
) -> Verified:
    """Read of each row the certain token, which is the root, and the path behind it that the model goes.

    Args:
      model, state: the model and its streams. The state is donated.
      tokens, parents, given: the nodes, see `TokenTree`; a row without a root stands still.
      key, index, sampler: how the model chooses; `index[b]` is the number of the draw behind row b's root.
      levels: no node that is as deep is read.
      stop: ids behind which a row reads nothing more.
      prompts: embeddings of tokens that the model reads behind each node too, see `ParallelPrompts`.
    """
    tree = TokenTree.from_parents(parents, given, levels)
    tree = tree.cut(allowed_levels(state, levels))
    if prompts is None:
        hidden, waiting = look_ahead_in_tree(model, state, tokens, tree)
    else:
        hidden, waiting = look_ahead_in_tree(model, state, *with_prompts(model, tokens, tree, prompts))
        hidden, behind = hidden[:, : tokens.shape[1]], hidden[:, tokens.shape[1] :]
    logits = model.logits(hidden)
    penalised = sampler.repetition_penalty != 1.0 and state.used is not None
    seen = seen_in_tree(state.used, tokens, tree) if penalised and state.used is not None else None
    chosen = choose(sampler, logits, key, index, seen, tree.depth)
    fine = jnp.isfinite(jnp.max(logits, axis=-1))
    goes_on = fine
    if stop:
        goes_on = fine & ~(tokens[:, :, None] == jnp.array(stop)).any(axis=-1)
    path, count = chosen_path(tree, tokens, chosen, goes_on)
    read = jnp.take_along_axis(tokens, path, axis=1)
    along = jnp.take_along_axis(hidden, path[:, :, None], axis=1)
    state = take_in_first(model, state, waiting_along(waiting, path), along, read, count)
    last = jnp.take_along_axis(path, jnp.maximum(count - 1, 0)[:, None], axis=1)
    following, finite = (jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (chosen, fine))
    ahead = None
    if prompts is not None:
        of_last = len(prompts) * last + jnp.arange(len(prompts), dtype=jnp.int32)
        ahead = jnp.take_along_axis(behind, of_last[:, :, None], axis=1)
    return Verified(state, read, count, following, (count > 0) & ~finite, ahead)


def with_prompts(
    model: Decoder, tokens: Int32[Array, "B N"], tree: TokenTree, prompts: Float[Array, "M E"]
) -> tuple[Int32[Array, "B P"], TokenTree, Float[Array, "B P W"]]:
    """A tree with M prompt tokens one after another behind each of its nodes, and what the first layer reads of it.

    Behind the N nodes come the prompt tokens of node 0, then those of node 1, and so on.
    """
    (rows, nodes), most = tokens.shape, len(prompts)
    tokens = jnp.where(tree.given, tokens, 0)
    at, step = jnp.repeat(jnp.arange(nodes), most), jnp.tile(jnp.arange(most), nodes)
    behind = jnp.where(step == 0, at, nodes + jnp.arange(nodes * most) - 1).astype(jnp.int32)
    parent = jnp.concatenate((tree.parent, jnp.broadcast_to(behind, (rows, nodes * most))), axis=1)
    given = jnp.concatenate((tree.given, jnp.repeat(tree.given, most, axis=1)), axis=1)
    tokens, x = prompts_behind(model, tokens, prompts, nodes)
    return tokens, TokenTree.from_parents(parent, given, tree.levels + most), x


def prompts_behind(
    model: Decoder, tokens: Int32[Array, "B N"], prompts: Float[Array, "M E"], copies: int
) -> tuple[Int32[Array, "B P"], Float[Array, "B P W"]]:
    """Rows of tokens with prompt tokens behind them, so many times all M, as ids and as the first layer reads them.

    The ids of prompt tokens are 0 and mean nothing.
    """
    x = model.embed(tokens)
    mine = jnp.pad(jnp.tile(prompts, (copies, 1)), ((0, 0), (0, x.shape[2] - prompts.shape[1]))).astype(x.dtype)
    x = jnp.concatenate((x, jnp.broadcast_to(mine, (len(tokens), *mine.shape))), axis=1)
    return jnp.pad(tokens, ((0, 0), (0, len(mine)))), x
