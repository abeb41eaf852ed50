"""Training of a side network beside a frozen model (LongMem, Wang et al., 2306.07174).

Rows are streams that go on from step to step: each step reads the next stretch of every row, with the bank that all
stretches before it have filled, and the loss is what its tokens cost. Nothing is differentiated but the side network on
this stretch: what lies in windows and in the bank is what it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from streamjax.field_checks import NotNegative, Positive, Size, check_fields
from streamjax.kv.cache import Cache
from streamjax.models.decoder import Decoder
from streamjax.models.quantising import refuse_quantised
from streamjax.models.side_network import SideConfig, SideDecoder, SideNetwork
from streamjax.streaming.state import StreamState, init_state
from streamjax.streaming.step import advance, surprise
from streamjax.training.schedules import warmup_cosine


@dataclasses.dataclass(frozen=True)
class SideTraining:
    """How a side network is trained.

    Attributes:
      steps: stretches of every row.
      learning_rate: of AdamW, the highest; it rises in the first twentieth of the steps and falls to 0. The paper's is
        2e-4, over 26 billion tokens.
      weight_decay: the paper's.
      scale: how much of its own a side layer adds at the beginning. 1 is the paper's; what a model that small a share
        of its training has gone by can do is begin near what the frozen model says.
    """

    steps: Size = 1000
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 0.01
    scale: NotNegative = 0.1

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        rate = warmup_cosine(self.learning_rate, self.steps, risen=20)
        adamw = optax.adamw(rate, b1=0.9, b2=0.98, eps=1e-6, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)


class SideStep(NamedTuple):
    """The model with its side network behind a step, and what the step's tokens cost before it, in nats a token."""

    model: SideDecoder
    loss: float


def train_side_network(
    model: Decoder, side: SideConfig, cache: Cache, stretches: Iterable[np.ndarray], config: SideTraining
) -> Iterator[SideStep]:
    """Train a side network, one step at a time; whoever reads the steps may stop anywhere.

    Args:
      model: stays as it is.
      side: where its side network stands.
      cache: of every layer, such as `sj.kv.preset("long_mem")`.
      stretches: int32 [B, C], the next C tokens of each of B streams, such as `side_by_side` gives. They should not end
        before the steps do.
      config: how.

    Raises:
      ValueError: a model that can have no such side network, or one with quantised weights.
    """
    refuse_quantised(model, "a side network begins as a part of the model")
    own = SideNetwork.beginning(model, side, config.scale)
    moments, state = config.optimizer.init(own), None
    for _, tokens in zip(range(config.steps), stretches, strict=False):
        if state is None:
            state = init_state(SideDecoder(model, own), cache, tokens.shape[0])
        own, moments, state, loss = _learn(own, moments, model, state, jnp.asarray(tokens), config)
        yield SideStep(SideDecoder(model, own), float(loss))


def stretches_of(ids: np.ndarray, rows: int, length: int) -> Iterator[np.ndarray]:
    """A text as `rows` streams, each a part of it that is read again and again: the next `length` tokens of each.

    Raises:
      ValueError: a text too short for one stretch of every row.
    """
    part = len(ids) // rows // length * length
    if not part:
        raise ValueError(f"a text of {len(ids):,} tokens has no {rows} parts of {length}")
    whole = np.asarray(ids[: rows * part], np.int32).reshape(rows, part)
    while True:
        for start in range(0, part, length):
            yield whole[:, start : start + length]


@partial(jax.jit, static_argnames="config", donate_argnames=("side", "moments", "state"))
def _learn(
    side: SideNetwork,
    moments: Any,
    model: Decoder,
    state: StreamState,
    tokens: Int32[Array, "B C"],
    config: SideTraining,
) -> tuple[SideNetwork, Any, StreamState, Float[Array, ""]]:
    def cost(side: SideNetwork) -> tuple[Float[Array, ""], StreamState]:
        whole = SideDecoder(model, side)
        new, hidden = advance(whole, state, tokens, differentiable=True)
        count = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
        return jnp.mean(surprise(whole, state, hidden, tokens, count)), new

    (loss, new), slope = jax.value_and_grad(cost, has_aux=True)(side)
    change, moments = config.optimizer.update(slope, moments, side)
    return optax.apply_updates(side, change), moments, new, loss
