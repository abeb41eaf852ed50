"""Orthogonal directions of every head's keys and values, trained and cut (MatryoshkaKV, Lin et al., 2410.14731).

Each key head's keys, before rotation, and values are projected on the first r columns of an orthogonal matrix and back.
The matrices begin as the principal directions of a text. Training turns them, by Cayley's map of a skew matrix, so that
a model whose heads have ranks that are drawn anew at every step says the same as the whole model. A greedy search then
takes ranks from the heads whose loss moves the last hidden states least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from streamjax.attention.dispatch import sequence_attention
from streamjax.field_checks import NotNegative, Positive, Size, check_fields
from streamjax.kv.channels.projection_file import HeadProjections, Projections
from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import Attention, SequenceContext
from streamjax.models.mixers.handed_on.learned_bounds import with_bounds
from streamjax.streaming.compacting.attention_layers import measure_layers
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.training.schedules import warmup_cosine

Bases = dict[int, Float[Array, "2 K D D"]]  # of keys and of values of each layer that has them
Ranks = dict[int, Int[np.ndarray, "2 K"]]


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """How matrices are trained; the defaults are the published code's.

    Attributes:
      steps: of Adam.
      learning_rate: the highest; it rises in the first tenth of the steps and falls to 0.
      levels: ranks are drawn among so many, in equal steps up to all of a head's channels.
      distilled: share of the loss that is the divergence from the whole model; the rest is that of the text.
    """

    steps: Size = 1000
    learning_rate: Positive = 1e-3
    levels: Size = 8
    distilled: NotNegative = 0.25

    def __post_init__(self) -> None:
        check_fields(self)
        if self.distilled > 1:
            raise ValueError(f"ProjectionConfig.distilled is {self.distilled}: it must be from 0 to 1, a share")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        rate = warmup_cosine(self.learning_rate, self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


class ProjectionStep(NamedTuple):
    """Matrices behind a step, and the loss before it, at the ranks that were drawn."""

    bases: Bases
    loss: float


def principal_bases(model: Decoder, text: Any) -> tuple[Bases, list[tuple[str, int] | None]]:
    """Of every head the directions that hold most of its squares, the best first; and what bounds the other layers.

    Raises:
      ValueError: rows that are not of one length, or a layer that is no attention with heads of its own.
    """

    def measure(block: Block, mixer: AttentionConfig, x: Float[Array, "B T E"], context: SequenceContext) -> Array:
        squares = np.asarray(_squares(block, x), np.float64)
        return jnp.asarray(np.linalg.eigh(squares)[1][..., ::-1], jnp.float32)

    found, _ = measure_layers(model, text, measure, needs="projections need", lacks="keys could be projected")
    bases = {i: layer for i, layer in enumerate(found) if not isinstance(layer, tuple)}
    return bases, [layer if isinstance(layer, tuple) else None for layer in found]


@jax.jit
def _squares(block: Block, x: Float[Array, "B T E"]) -> Float[Array, "2 K D D"]:
    assert isinstance(block.mixer, Attention)
    parts = block.mixer.projections.keys(block.mixer_input(x))
    return jnp.stack([jnp.einsum("btkd,btke->kde", x, x, precision="highest") for x in parts]).astype(jnp.float32)


def turned_bases(first: Bases, turns: Bases) -> Bases:
    """Orthogonal matrices, turned by Cayley's map of the skew part of others: (I - A/2)^-1 (I + A/2), A = X - X^T."""

    def turn(basis: Array, x: Array) -> Array:
        half, one = (x - x.swapaxes(-1, -2)) / 2, jnp.eye(x.shape[-1], dtype=x.dtype)
        # The same by an inverse of what is symmetric: (I - S)^-1 (I + S) = (I - S S)^-1 (I + S)^2.
        whole = _inverse(one - _product(half, half))
        return _product(basis, _product(whole, _product(one + half, one + half)))

    return {i: turn(first[i], turns[i]) for i in first}


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _inverse(x: Float[Array, "*N D D"]) -> Float[Array, "*N D D"]:
    """Of symmetric matrices whose eigenvalues are at least 1, by Newton's steps (Schulz).

    Products alone: a program with `jnp.linalg.solve` of several layers did not return on CPUs (JAX 0.10.2, two cores,
    matrices of 64: all threads slept).
    """
    one = jnp.eye(x.shape[-1], dtype=x.dtype)

    def step(near: Array) -> Array:
        return _product(near, 2 * one - _product(x, near))

    largest = jnp.max(jnp.sum(jnp.abs(x), axis=-1, keepdims=True), axis=-2, keepdims=True)  # no eigenvalue is larger
    found = jax.lax.fori_loop(0, 20, lambda _, near: step(near), jnp.broadcast_to(one, x.shape) / largest)
    return step(jax.lax.stop_gradient(found))  # whose derivative is the inverse's


def projected_hidden(
    model: Decoder, bases: Bases, ranks: Mapping[int, Int[Array, "2 K"]], tokens: Int[Array, "B T"]
) -> Float[Array, "B T E"]:
    """Hidden states after the last norm, where heads keep the first `ranks` directions of their keys and values."""
    context = SequenceContext.from_start(*tokens.shape)

    @jax.checkpoint
    def projected(block: Block, x: Array, basis: Array, rank: Array) -> Array:
        assert isinstance(block.mixer, Attention)
        q, *pair = block.mixer.projections.split(block.mixer_input(x))
        kept = jnp.arange(basis.shape[-1]) < rank[..., None]
        k, v = (
            jnp.einsum("btkd,kdr,ker->btke", part, mine * some[:, None], mine, precision="highest").astype(part.dtype)
            for part, mine, some in zip(pair, basis, kept, strict=True)
        )
        q, k, v = block.mixer.turned(q, k, v, context)
        config = block.mixer.config
        heads = sequence_attention(
            q, k, v, config.pattern, scale=config.softmax_scale, softcap=config.softcap, slopes=block.mixer.slopes(),
            sink_logits=block.mixer.learned_sinks(),
        )  # fmt: skip
        return block.combine(x, heads)

    model = with_bounds(model)
    x = model.embed(tokens)
    for i in range(model.config.num_layers):
        block = model.layer(i)
        x = projected(block, x, bases[i], ranks[i]) if i in bases else block.parallel(x, context)[0]
    return model.norm(x)


def projection_loss(
    turns: Bases,
    first: Bases,
    model: Decoder,
    ranks: Mapping[int, Int[Array, "2 K"]],
    tokens: Int[Array, "B T"],
    distilled: float | Array,
) -> Float[Array, ""]:
    """Divergence from the whole model, and what the text costs, in nats a token."""
    model = jax.lax.stop_gradient(model)
    whole = jax.nn.log_softmax(model.logits(model.hidden(tokens))[:, :-1])
    hidden = projected_hidden(model, turned_bases(first, turns), ranks, tokens)
    said = jax.nn.log_softmax(model.logits(hidden)[:, :-1])
    divergence = jnp.mean(jnp.sum(jnp.exp(whole) * (whole - said), axis=-1))
    text = -jnp.mean(jnp.take_along_axis(said, tokens[:, 1:, None], axis=-1))
    return distilled * divergence + (1 - distilled) * text


def train_projections(
    model: Decoder, first: Bases, batches: Iterable[np.ndarray | Array], config: ProjectionConfig, seed: int = 0
) -> Iterator[ProjectionStep]:
    """Train matrices, one step at a time; whoever reads the steps may stop anywhere.

    Args:
      model: stays as it is.
      first: where the matrices begin, from `principal_bases`.
      batches: token ids [B, T]; they should not end before the steps do.
      config: how.
      seed: of the ranks that are drawn.
    """
    draw, optimizer = np.random.default_rng(seed), config.optimizer

    @partial(jax.jit, donate_argnums=(0, 1))
    def advance(turns: Bases, moments: Any, first: Bases, model: Decoder, ranks: Any, tokens: Array) -> tuple:
        loss, slope = jax.value_and_grad(projection_loss)(turns, first, model, ranks, tokens, config.distilled)
        change, moments = optimizer.update(slope, moments)
        turns = optax.apply_updates(turns, change)
        return turns, moments, loss, turned_bases(first, turns)

    turns = {i: jnp.zeros_like(basis) for i, basis in first.items()}
    moments = optimizer.init(turns)
    for _, tokens in zip(range(config.steps), batches, strict=False):
        ranks = {
            i: jnp.asarray(np.ceil(draw.integers(1, config.levels + 1, x.shape[:2]) * x.shape[-1] / config.levels), int)
            for i, x in first.items()
        }
        turns, moments, loss, bases = advance(turns, moments, first, model, ranks, jnp.asarray(tokens))
        yield ProjectionStep(bases, float(loss))


def search_ranks(
    model: Decoder, bases: Bases, tokens: np.ndarray, share: float, levels: int = 8, together: float = 0.125
) -> Ranks:
    """How many directions each head keeps, so that on average at most a `share` of the channels are left.

    In each round every head that has more than the least rank loses a step by itself, the `together`-th part of them
    whose loss moves the last hidden states least do so together, and the next round begins there.

    Args:
      model, bases: whose heads.
      tokens: ids [B, T] on which the hidden states are compared.
      share: of all channels of keys and values.
      levels: equal steps of a head's channels; the least rank is one of them.
      together: share of the heads that lose a step in a round.

    Raises:
      ValueError: a share below one step of every head, or above 1.
    """
    if not 1 / levels <= share <= 1:
        raise ValueError(f"search_ranks: share is {share}: with {levels} levels it must be from {1 / levels:g} to 1")
    ids = jnp.asarray(tokens, jnp.int32)
    states = jax.jit(projected_hidden)
    left = {(i, *place): levels for i, basis in bases.items() for place in np.ndindex(*basis.shape[:2])}
    goal = share * levels * len(left)

    def hidden(left: dict) -> np.ndarray:
        return np.asarray(states(model, bases, _ranks(bases, left, levels), ids), np.float64)

    while sum(left.values()) > goal:
        now, moved = hidden(left), {}
        for place in [place for place, level in left.items() if level > 1]:
            moved[place] = float(np.linalg.norm(hidden({**left, place: left[place] - 1}) - now))
        most = min(max(int(together * len(left)), 1), int(np.ceil(sum(left.values()) - goal)))
        for place in sorted(moved, key=moved.__getitem__)[:most]:
            left[place] -= 1
    return {i: np.asarray(x) for i, x in _ranks(bases, left, levels).items()}


def _ranks(bases: Bases, left: Mapping[tuple, int], levels: int) -> dict[int, Array]:
    return {
        i: jnp.asarray(
            [
                [int(np.ceil(left[i, role, head] * x.shape[-1] / levels)) for head in range(x.shape[1])]
                for role in (0, 1)
            ]
        )
        for i, x in bases.items()
    }


def as_file(
    model: Decoder, bases: Bases, ranks: Ranks, bounds: list[tuple[str, int] | None], tokens: int
) -> HeadProjections:
    """What was trained and searched for, for `save`; `bounds`: of the layers without matrices."""
    layers: list[Projections | tuple[str, int]] = []
    for i, bound in enumerate(bounds):
        if bound is not None:
            layers.append(bound)
        else:
            keys, values = np.asarray(bases[i], np.float32)
            layers.append(Projections(keys, values, np.asarray(ranks[i], np.int64)))
    return HeadProjections(tuple(layers), fingerprint_in_any_dtype(model), tokens)
