"""Training of prompt tokens, with which a frozen model guesses ahead (Chen et al., 2405.18628).

Behind places of a text stand prompt tokens, as branches of it: they see the text up to their place and those of the
same place in front of them, and the text sees none of them. At prompt token i of place t the model is to say what it
says at t + i. Their embeddings are all that is trained. A row is read as a token tree, by the pass that decoding takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int32

from streamjax.attention.token_tree import TokenTree
from streamjax.kv.cascade import Cascade
from streamjax.kv.tiers.window import Window
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.speculative.heads.prompt_file import PromptTokens
from streamjax.streaming.speculative.heads.vocabulary import DraftVocabulary
from streamjax.streaming.speculative.tree_verification import prompts_behind
from streamjax.streaming.speculative.two_phases import look_ahead_in_tree
from streamjax.streaming.state import StreamState, init_state
from streamjax.training.heads.drafting import DraftHeadsConfig, DraftStep

_DECAY = 0.8  # weight of each prompt token's loss in that of the one before it, as in the paper


def train_prompt_tokens(
    model: Decoder,
    ids: Int32[np.ndarray, " V"],
    batches: Iterable[Int[np.ndarray, "B T"]],
    config: DraftHeadsConfig,
    seed: int = 0,
    places: int = 32,
) -> Iterator[DraftStep]:
    """Train prompt tokens for a model, one step at a time; whoever reads the steps may stop anywhere.

    Args:
      model: stays as it is.
      ids: the tokens that are guessed, in order.
      batches: tokens of rows of one length. They should not end before the steps do.
      config: how; `heads` is how many prompt tokens there are, `width` means nothing here.
      seed: of the places, and of the tokens whose embeddings are the first ones.
      places: places of a row behind which prompt tokens stand.

    Raises:
      ValueError: a model with recurrent layers or a chunk memory, which would read each prompt token's path by itself.
    """
    kinds = [kind for i in range(model.config.num_layers) for kind in (model.layer(i).mixer, model.layer(i).beside)]
    if model.config.hsa is not None or any(isinstance(kind, RecurrentMixer) for kind in kinds):
        raise ValueError("prompt tokens need a model whose every layer attends; train heads instead: --kind=hydra")
    draw = np.random.default_rng(seed)
    first = jnp.asarray(draw.choice(ids, (1, config.heads)))
    weights = model.embed(first)[0, :, : model.config.d_model].astype(jnp.float32)
    moments, vocabulary = config.optimizer.init(weights), DraftVocabulary.from_model(model, jnp.asarray(ids))
    for _, tokens in zip(range(config.steps), batches, strict=False):
        rows, length = tokens.shape
        at = draw.integers(0, length - config.heads, (rows, places))
        state = _empty(model, rows, length + config.heads)
        weights, moments, loss, right = _learn(
            model, vocabulary, weights, moments, state, jnp.asarray(tokens), jnp.asarray(at, jnp.int32), config
        )
        yield DraftStep(weights, float(loss), np.asarray(right).tolist())


def as_file(model: Decoder, ids: Int32[np.ndarray, " V"], weights: Float[Array, "M E"], tokens: int) -> PromptTokens:
    """What a step has left, for `save`; `tokens`: how many were read so far."""
    return PromptTokens(np.asarray(weights), ids, fingerprint_in_any_dtype(model), tokens)


def _empty(model: Decoder, rows: int, length: int) -> StreamState:
    return init_state(model, Cascade(Window(length)), rows)


@partial(jax.jit, static_argnames="config", donate_argnames=("weights", "moments"))
def _learn(
    model: Decoder,
    vocabulary: DraftVocabulary,
    weights: Float[Array, "M E"],
    moments: Any,
    state: StreamState,
    tokens: Int32[Array, "B T"],
    places: Int32[Array, "B n"],
    config: DraftHeadsConfig,
) -> tuple[Float[Array, "M E"], Any, Float[Array, ""], Float[Array, " M"]]:
    measured = jax.value_and_grad(prompt_loss, has_aux=True)
    (loss, right), slope = measured(weights, model, vocabulary, state, tokens, places)
    change, moments = config.optimizer.update(slope, moments, weights)
    return optax.apply_updates(weights, change), moments, loss, right


def prompt_loss(
    prompts: Float[Array, "M E"],
    model: Decoder,
    vocabulary: DraftVocabulary,
    state: StreamState,
    tokens: Int32[Array, "B T"],
    places: Int32[Array, "B n"],
) -> tuple[Float[Array, ""], Float[Array, " M"]]:
    """Cross entropy of what is said at prompt tokens to the model, and how often its first choice is the model's.

    Args:
      prompts: their embeddings.
      model, vocabulary: the model, and the tokens that are guessed.
      state: of streams that have read nothing.
      tokens, places: rows, and the places behind which prompt tokens stand, at least M from a row's end.
    """
    (rows, length), count, most = tokens.shape, places.shape[1], len(prompts)
    tree = prompts_beside(length, places, most)
    every, x = prompts_behind(model, tokens, prompts, count)
    hidden, _ = look_ahead_in_tree(model, state, every, tree, x, differentiable=True)
    said = jax.lax.stop_gradient(vocabulary.logits(model, hidden[:, :length]))
    guessed = vocabulary.logits(model, hidden[:, length:]).reshape(rows, count, most, -1)
    later = places[:, :, None] + 1 + jnp.arange(most)
    wanted = jnp.take_along_axis(said[:, :, None], later.reshape(rows, -1, 1, 1), axis=1).reshape(guessed.shape)
    losses = jnp.mean(optax.softmax_cross_entropy(guessed, jax.nn.softmax(wanted)), axis=(0, 1))
    right = jnp.mean(jnp.argmax(guessed, axis=-1) == jnp.argmax(wanted, axis=-1), axis=(0, 1))
    weight = _DECAY ** jnp.arange(most)
    return jnp.sum(losses * weight) / jnp.sum(weight), right


def prompts_beside(length: int, places: Int32[Array, "B n"], most: int) -> TokenTree:
    """Rows of `length` tokens, each behind the one before it, and `most` prompt tokens behind each of the places."""
    rows, count = places.shape
    text = jnp.arange(length, dtype=jnp.int32)
    at, step = jnp.repeat(places, most, axis=1), jnp.tile(jnp.arange(most, dtype=jnp.int32), count)
    of_text = jnp.concatenate((jnp.broadcast_to(text, (rows, length)), at), axis=1)  # the newest token of the text
    sees_text = text <= of_text[:, :, None]
    group = jnp.arange(count * most) // most
    among = (group[:, None] == group) & (step[:, None] >= step)
    sees_prompts = jnp.broadcast_to(jnp.pad(among, ((length, 0), (0, 0))), (rows, length + count * most, count * most))
    parent = jnp.concatenate((jnp.maximum(text - 1, 0), length + jnp.arange(count * most, dtype=jnp.int32) - 1))
    parent = jnp.broadcast_to(parent, (rows, length + count * most))
    parent = parent.at[:, length:].set(jnp.where(step == 0, at, parent[:, length:]))
    depth = jnp.concatenate((jnp.broadcast_to(text, (rows, length)), at + 1 + step), axis=1)
    given = jnp.ones_like(depth, bool)
    return TokenTree(parent, depth, given, jnp.concatenate((sees_text, sees_prompts), axis=2), length + most)
