"""Networks that say which tokens will be asked for (Locret, Huang et al., 2410.01805).

In each layer without a bound of its own a small network reads a token's queries, keys and values, before rotation, and
says for each key head the largest attention logit that the token will get from the queries of an answer. The model is
frozen and layers do not wait for each other's gradients: one pass over a batch trains the network of every layer on the
way. The loss is a smooth L1 distance to these logits, plus the squared difference between neighbours' scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import Array, Bool, Float

from streamjax.field_checks import NotNegative, Positive, Size, check_fields
from streamjax.kv.pages.kth_largest import kth_largest
from streamjax.kv.scores.retaining import RetainingHeads, retaining_scores
from streamjax.kv.scores.retaining_file import LayerRetainingHeads
from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import Attention, SequenceContext
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.training.schedules import warmup_cosine

_BEST = 0.1  # share of the tokens that are compared with those that logits rank highest

Weights = tuple[Float[Array, "I W"], Float[Array, "W K"]]
Trained = tuple[Weights, optax.OptState]


@dataclasses.dataclass(frozen=True)
class RetainingConfig:
    """How networks are trained; the defaults are the paper's, but for the width, which is 1,024 there.

    Attributes:
      steps: batches.
      updates: steps of AdamW on each batch. What the model computes costs most, so a few more cost little.
      learning_rate: the highest; it rises in the first tenth of the steps, and falls to 0.
      width: of the hidden layer. The matrices lie in the state of each stream.
      smoothing: weight of the difference between neighbours, for each layer.
    """

    steps: Size = 3000
    updates: Size = 1
    learning_rate: Positive = 5e-4
    width: Size = 128
    smoothing: NotNegative = 0.0025

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        rate = warmup_cosine(self.learning_rate, self.steps * self.updates)
        return optax.chain(optax.clip(0.5), optax.adamw(rate, b1=0.9, b2=0.95))


class RetainingStep(NamedTuple):
    """Networks behind a step, and what the step measured before it, on the mean over layers.

    loss: distance and smoothing. found: of the tenth of the tokens with the largest logits, the share that the scores
    rank as high.
    """

    layers: Sequence[Weights | tuple[str, int]]
    loss: float
    found: float


def train_retaining_heads(
    model: Decoder, batches: Iterable[Mapping[str, np.ndarray | Array]], config: RetainingConfig, seed: int = 0
) -> Iterator[RetainingStep]:
    """Train the networks of a model, one step at a time; whoever reads the steps may stop anywhere.

    Args:
      model: stays as it is.
      batches: tokens, int32 [B, T], and answers, bool [B, T], true for the queries whose logits count, such as
        `answer_batches` of `training.heads.gates` gives. They should not end before the steps do.
      config: how.
      seed: of the first weights.

    Raises:
      ValueError: a layer that is no attention with heads of its own, or whose queries grow with their position.
    """
    draw, layers = np.random.default_rng(seed), []  # type: ignore[var-annotated]
    for i, block in enumerate(model.config.blocks):
        layers.append(_begun(block.mixer, i, config, draw))
    if not any(isinstance(layer, list) for layer in layers):
        raise ValueError("every layer of the model has a bound of its own: no head chooses what it retains")
    for _, batch in zip(range(config.steps), batches, strict=False):
        tokens, answers = jnp.asarray(batch["tokens"]), jnp.asarray(batch["answers"])
        context, x = SequenceContext.from_start(*tokens.shape), _embedded(model, tokens)
        measured = []
        for i, layer in enumerate(layers):
            if isinstance(layer, list):
                smoothing = config.smoothing * len(layers)
                x, layers[i], *told = _learn(model.layer(i), x, context, answers, layer, smoothing, config)
                measured.append(told)
            else:
                x = _passed(model.layer(i), x, context)
        loss, found = np.mean(np.array(measured, np.float64), axis=0)
        yield RetainingStep([layer[0] if isinstance(layer, list) else layer for layer in layers], loss, found)


def as_file(model: Decoder, step: RetainingStep, tokens: int) -> LayerRetainingHeads:
    """What a step has left, for `save`; `tokens`: how many were read so far."""
    own = fingerprint_in_any_dtype(model)
    layers: list = []
    for layer in step.layers:
        if isinstance(layer[0], str):
            layers.append(layer)
        else:
            inward, outward = layer
            layers.append(RetainingHeads.from_arrays(np.asarray(inward), np.asarray(outward), model=own))
    return LayerRetainingHeads(tuple(layers), own, tokens)  # type: ignore[arg-type]


def text_batches(
    ids: np.ndarray, length: int, answer: int, rows: int, seed: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Batches without end of stretches of a text, of which the last `answer` tokens ask for what stands before them.

    Raises:
      ValueError: a text that is no longer than a stretch, or a stretch that is all answer.
    """
    if len(ids) <= length or answer >= length:
        raise ValueError(f"a text of {len(ids)} tokens has no stretches of {length} with {answer} that ask")
    draw = np.random.default_rng(seed)
    asks = np.broadcast_to(np.arange(length) >= length - answer, (rows, length))
    while True:
        starts = draw.integers(0, len(ids) - length, rows)
        yield {"tokens": np.stack([ids[i : i + length] for i in starts]).astype(np.int32), "answers": asks}


def _begun(mixer: object, index: int, config: RetainingConfig, draw: np.random.Generator) -> list | tuple[str, int]:
    """A network before its first step, or what bounds the layer."""
    if not isinstance(mixer, AttentionConfig) or mixer.temperature is not None:
        raise ValueError(f"layer {index} has no heads that could retain tokens: {type(mixer).__name__}")
    if mixer.bound is not None:
        return mixer.bound
    channels = (mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_dim
    shapes = (channels, config.width), (config.width, mixer.num_kv_heads)
    weights = tuple(jnp.asarray(draw.normal(size=shape) / np.sqrt(shape[0]), jnp.float32) for shape in shapes)
    return [weights, config.optimizer.init(weights)]


@jax.jit
def _embedded(model: Decoder, tokens: Array) -> Float[Array, "B T E"]:
    return model.embed(tokens)


@jax.jit
def _passed(block: Block, x: Float[Array, "B T E"], context: SequenceContext) -> Float[Array, "B T E"]:
    return block.parallel(x, context)[0]


@partial(jax.jit, static_argnames="config", donate_argnames="trained")
def _learn(
    block: Block,
    x: Float[Array, "B T E"],
    context: SequenceContext,
    answers: Bool[Array, "B T"],
    trained: list,
    smoothing: float | Array,
    config: RetainingConfig,
) -> tuple[Float[Array, "B T E"], list, Float[Array, ""], Float[Array, ""]]:
    """One layer: its output, its network behind a step, the loss before it, and the share that was found."""
    assert isinstance(block.mixer, Attention)
    raw = block.mixer.projections.split(block.mixer_input(x))
    wanted, asked = largest_logits(block, x, context, answers)
    measured = jax.value_and_grad(retaining_loss, has_aux=True)

    def update(trained: list, _: None) -> tuple[list, Float[Array, ""]]:
        (loss, _), slope = measured(trained[0], raw, wanted, asked, smoothing)
        change, moments = config.optimizer.update(slope, trained[1], trained[0])
        return [optax.apply_updates(trained[0], change), moments], loss

    said = retaining_scores(*raw, *trained[0])
    trained, losses = jax.lax.scan(update, trained, length=config.updates)
    return block.parallel(x, context)[0], trained, losses[0], _found(said, wanted, asked)


def largest_logits(
    block: Block, x: Float[Array, "B T E"], context: SequenceContext, answers: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T K"], Bool[Array, "B T"]]:
    """The largest logit that each token gets from the answers' queries behind it, and whether there are any."""
    q, k, _ = block.project(x, context)
    heads, scale = k.shape[2], block.attention.config.softmax_scale
    length = jnp.arange(x.shape[1])
    sees = answers[:, :, None] & (length[:, None] > length)

    def of_head(head: tuple[Array, Array]) -> Float[Array, "B T"]:  # one at a time: T x T logits of its query heads
        mine, own = head
        logits = jnp.einsum("bqgd,bkd->bgqk", mine, own, preferred_element_type=jnp.float32) * scale
        return jnp.max(jnp.where(sees[:, None], logits, -jnp.inf), axis=(1, 2))

    by_head = rearrange(q, "b t (k g) d -> k b t g d", k=heads), rearrange(k, "b t k d -> k b t d")
    found = rearrange(jax.lax.map(of_head, by_head), "k b t -> b t k")
    asked = jnp.any(sees, axis=1)
    return jnp.where(asked[..., None], found, 0.0), asked


def retaining_loss(
    weights: Weights,
    raw: tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]],
    wanted: Float[Array, "B T K"],
    asked: Bool[Array, "B T"],
    smoothing: float | Array,
) -> tuple[Float[Array, ""], Float[Array, "B T K"]]:
    """Distance and smoothing over the tokens that are `asked` for, and what the network says."""
    said = retaining_scores(*raw, *weights)
    here, both = asked[..., None], (asked[:, 1:] & asked[:, :-1])[..., None]
    distance = jnp.sum(optax.losses.huber_loss(said, wanted) * here) / jnp.maximum(jnp.sum(here) * said.shape[2], 1)
    rough = jnp.sum(jnp.square(said[:, 1:] - said[:, :-1]) * both) / jnp.maximum(jnp.sum(both) * said.shape[2], 1)
    return distance + smoothing * rough, said


def _found(said: Float[Array, "B T K"], wanted: Float[Array, "B T K"], asked: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Of the tokens that are wanted most, the share that is among those that are said to be."""
    count = max(int(_BEST * said.shape[1]), 1)

    def best(x: Array) -> Bool[Array, "B K T"]:
        x = jnp.where(asked[..., None], x, -jnp.inf).swapaxes(1, 2)
        return x >= kth_largest(x, count)

    return jnp.mean(jnp.sum(best(said) & best(wanted), axis=2) / count)
