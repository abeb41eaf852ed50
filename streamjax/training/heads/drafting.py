"""Training of draft heads: what guesses how a frozen model goes on (Hydra, Ankner et al., 2402.05109).

A head learns to say what the model itself says, i + 1 tokens behind the state that it reads: the loss is the cross
entropy to the model's own distribution over the tokens that are guessed, not to the text's next token. So any text
will do, best one that is like what the model writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int32

from streamjax.field_checks import Positive, Size, check_fields
from streamjax.models.decoder import Decoder
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.speculative.heads.hydra import HydraWeights, head_state
from streamjax.streaming.speculative.heads.hydra_file import HydraHeads
from streamjax.streaming.speculative.heads.vocabulary import DraftVocabulary, embedded
from streamjax.training.schedules import warmup_cosine


@dataclasses.dataclass(frozen=True)
class DraftHeadsConfig:
    """How heads are trained.

    Attributes:
      heads: how many tokens behind the next one are guessed.
      steps: batches.
      learning_rate: the highest; it rises in the first tenth of the steps, and falls to 0.
      width: of the heads' hidden layers.
    """

    heads: Size = 3
    steps: Size = 2000
    learning_rate: Positive = 3e-4
    width: Size = 1024

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        rate = warmup_cosine(self.learning_rate, self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95))


class DraftStep(NamedTuple):
    """What guesses behind a step, and what the step measured before it.

    weights: heads, or embeddings of prompt tokens. loss: on the mean over these. right: of each, how often its best
    guess was the model's own first choice.
    """

    weights: HydraWeights | Float[Array, "M E"]
    loss: float
    right: list[float]


def frequent_ids(ids: Int[np.ndarray, " N"], count: int) -> Int32[np.ndarray, " V"]:
    """The `count` most frequent tokens of a text, or all that are in it, in order."""
    found, times = np.unique(ids, return_counts=True)
    return np.sort(found[np.argsort(-times, kind="stable")[:count]]).astype(np.int32)


def first_weights(config: DraftHeadsConfig, width: int, seed: int = 0) -> HydraWeights:
    """Heads that change nothing yet: they say what the hidden state of `width` channels says."""
    draw = np.random.default_rng(seed)
    shapes = [((1 + i) * width, config.width) for i in range(1, config.heads + 1)]
    inward = tuple(jnp.asarray(draw.normal(size=shape) / np.sqrt(shape[0]), jnp.float32) for shape in shapes)
    return HydraWeights(inward, tuple(jnp.zeros((config.width, width), jnp.float32) for _ in shapes))


def train_draft_heads(
    model: Decoder,
    ids: Int32[np.ndarray, " V"],
    batches: Iterable[Int[np.ndarray, "B T"]],
    config: DraftHeadsConfig,
    seed: int = 0,
    start: HydraWeights | None = None,
    kept_bytes: int = 1 << 31,
) -> Iterator[DraftStep]:
    """Train Hydra heads for a model, one step at a time; whoever reads the steps may stop anywhere.

    Args:
      model: stays as it is.
      ids: the tokens that are guessed, in order.
      batches: tokens of rows, more than `config.heads` + 1 in each. They should not end before the steps do.
      config: how.
      seed: of the first weights.
      start: heads to go on from, of `config`'s number and width; what they guessed from may have been other tokens.
      kept_bytes: of the model's hidden states of rows, which are kept in the host's memory for when a row comes again:
        the model is most of the work.

    Raises:
      ValueError: heads to start from that have other shapes.
    """
    weights = first_weights(config, model.config.d_model, seed)
    if start is not None:
        if (asked := _shapes(weights)) != (found := _shapes(start)):
            raise ValueError(f"heads to go on from have matrices of {found}, and {asked} are asked for")
        weights = jax.tree.map(jnp.array, start)
    moments, vocabulary = config.optimizer.init(weights), DraftVocabulary.from_model(model, jnp.asarray(ids))
    states = HiddenStates(model, kept_bytes)
    for _, tokens in zip(range(config.steps), batches, strict=False):
        hidden = jnp.asarray(states(tokens))
        weights, moments, loss, right = _learn(model, vocabulary, weights, moments, jnp.asarray(tokens), hidden, config)
        yield DraftStep(weights, float(loss), np.asarray(right).tolist())


def _shapes(weights: HydraWeights) -> list[tuple[int, ...]]:
    return [x.shape for x in jax.tree.leaves(weights)]


class HiddenStates:
    """A model's hidden states of rows of tokens. Those of rows that come again are remembered, in the host's memory.

    Args:
      model: whose.
      most_bytes: that are remembered; rows that come when these are full are computed every time.
    """

    def __init__(self, model: Decoder, most_bytes: int):
        self._model, self._left = model, most_bytes
        self._known: dict[bytes, Float[np.ndarray, "T E"]] = {}

    def __call__(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T E"]:
        return np.stack([self._hidden_of(row) for row in np.asarray(tokens, np.int32)])

    def _hidden_of(self, row: Int32[np.ndarray, " T"]) -> Float[np.ndarray, "T E"]:
        key = row.tobytes()
        found = self._known.get(key)
        if found is None:
            found = np.asarray(_hidden(self._model, jnp.asarray(row[None])))[0]
            if found.nbytes <= self._left:
                self._left -= found.nbytes
                self._known[key] = found
        return found


@jax.jit
def _hidden(model: Decoder, tokens: Int32[Array, "B T"]) -> Float[Array, "B T E"]:
    return model.hidden(tokens)


@partial(jax.jit, static_argnames="config", donate_argnames=("weights", "moments"))
def _learn(
    model: Decoder,
    vocabulary: DraftVocabulary,
    weights: HydraWeights,
    moments: Any,
    tokens: Int32[Array, "B T"],
    hidden: Float[Array, "B T E"],
    config: DraftHeadsConfig,
) -> tuple[HydraWeights, Any, Float[Array, ""], Float[Array, " heads"]]:
    said = vocabulary.logits(model, hidden)
    measured = jax.value_and_grad(hydra_loss, has_aux=True)
    (loss, right), slope = measured(weights, model, vocabulary, tokens, hidden, said)
    change, moments = config.optimizer.update(slope, moments, weights)
    return optax.apply_updates(weights, change), moments, loss, right


def hydra_loss(
    weights: HydraWeights,
    model: Decoder,
    vocabulary: DraftVocabulary,
    tokens: Int32[Array, "B T"],
    hidden: Float[Array, "B T E"],
    said: Float[Array, "B T V"],
) -> tuple[Float[Array, ""], Float[Array, " heads"]]:
    """Cross entropy of the heads to the model, and how often each head's first choice is the model's.

    Head i reads the hidden state at t and the tokens t + 1, ..., t + i, and is to say what the model says at t + i.

    Args:
      hidden, said: the model's own, `said` over the tokens that are guessed.
    """
    own = embedded(model, tokens)
    losses, right = [], []
    for i in range(1, len(weights.inward) + 1):
        places = tokens.shape[1] - i
        read = jnp.stack([own[:, j : j + places] for j in range(1, i + 1)], axis=2)
        logits = vocabulary.logits(model, head_state(weights, i, hidden[:, :places], read))
        wanted = said[:, i:]
        losses.append(jnp.mean(optax.softmax_cross_entropy(logits, jax.nn.softmax(wanted))))
        right.append(jnp.mean(jnp.argmax(logits, axis=-1) == jnp.argmax(wanted, axis=-1)))
    return jnp.mean(jnp.stack(losses)), jnp.stack(right)


def as_file(model: Decoder, ids: Int32[np.ndarray, " V"], weights: HydraWeights, tokens: int) -> HydraHeads:
    """What a step has left, for `save`; `tokens`: how many were read so far."""
    inward, outward = (tuple(np.asarray(x) for x in side) for side in weights)
    return HydraHeads(inward, outward, ids, fingerprint_in_any_dtype(model), tokens)


def from_file(model: Decoder, path: str | Path) -> tuple[HydraWeights, int]:
    """Heads that were trained for a model, to go on from, and on how many tokens they were.

    Raises:
      ValueError: no such file, another one, or heads of another model.
    """
    heads = HydraHeads.load(path)
    if heads.model != fingerprint_in_any_dtype(model):
        raise ValueError(f"{path}: these draft heads were trained for another model")
    return HydraWeights(*(tuple(map(jnp.asarray, side)) for side in (heads.inward, heads.outward))), heads.tokens
