"""Which key heads look far back, found by optimisation (DuoAttention, Xiao et al., 2410.10819, section 2.2).

Each key head of a layer with full attention gets a gate a in [0, 1]: its query heads put out
`a * full attention + (1 - a) * attention to the first and the newest tokens`. The model is frozen. The gates begin at 1
and follow the gradient of how far the last hidden states of the answers to recall questions move away from the full
model's, plus an L1 penalty: what a head does not need its full context for draws its gate to 0.

Layers with a window of their own have no far heads; their gates are 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.partial import accumulator
from pallas_kernels.patterns import Full, Pattern, SinkWindow
from streamjax.attention.dispatch import sequence_attention
from streamjax.field_checks import Count, NotNegative, Positive, Size, check_fields
from streamjax.models.block import Block
from streamjax.models.config import ModelConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import SequenceContext

_FRUITLESS_ROWS = 1000  # rows without an answer, one after another, after which no row is expected to have one
_RAMP = 0.2  # share of the steps in which the learning rate rises, and of those in which it falls
_FLOOR = 0.1  # of the learning rate, at the first and at the last step


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """How gates are optimised; the defaults are the paper's (section 3.1).

    Attributes:
      steps: of Adam.
      learning_rate: between the first fifth of the steps, in which it rises from a tenth, and the last fifth, in which
        it falls to a tenth.
      l1: weight of the penalty on the gates.
      sinks, recent: the first tokens and the newest ones before a query that a head sees without its full context; as
        the options of the preset "duo_attention".
    """

    steps: Size = 2000
    learning_rate: Positive = 0.02
    l1: NotNegative = 0.05
    sinks: Count = 128
    recent: Size = 256

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def near(self) -> SinkWindow:
        """What a head with a gate of 0 sees: a query itself, `recent` tokens before it, the sinks."""
        return SinkWindow(self.sinks, self.recent + 1)

    @property
    def schedule(self) -> optax.Schedule:
        """Step (from 0) -> learning rate."""
        low, high, ramp = _FLOOR * self.learning_rate, self.learning_rate, max(int(_RAMP * self.steps), 1)
        rise, fall = optax.linear_schedule(low, high, ramp), optax.linear_schedule(high, low, ramp)
        return optax.join_schedules([rise, fall], [max(self.steps - ramp, ramp)])


class GateStep(NamedTuple):
    """Gates behind a step, and what the step measured before it: the loss and the distance in it."""

    gates: Float[Array, "L K"]
    loss: Float[Array, ""]
    distance: Float[Array, ""]


def far_layers(config: ModelConfig) -> Bool[np.ndarray, " L"]:
    """The layers whose heads may look far back: those without a window of their own.

    Raises:
      ValueError: a model without such layers; one with a chunk memory, whose other layers have windows by design; one
        whose layers differ in their heads, or that has recurrent layers.
    """
    if any(block.recurrent for block in config.blocks):
        raise ValueError("the model has recurrent layers: scores of heads are for models with attention in every layer")
    if any(block.mixer.keys_of is not None for block in config.blocks):
        raise ValueError("layers of the model share keys: scores of heads are for models with keys in every layer")
    if len({(block.attention.num_heads, block.attention.num_kv_heads) for block in config.blocks}) > 1:
        raise ValueError("the model's layers have different numbers of heads: scores are one table of layers and heads")
    if config.hsa is not None:
        raise ValueError("the model reads a chunk memory (HSA): its layers have no heads to choose among")
    found = np.array([block.mixer.reach is None for block in config.blocks])
    if not found.any():
        raise ValueError("every layer of the model has a sliding window of its own: no head looks far back")
    return found


def gated_hidden(
    model: Decoder, gates: Float[Array, "L K"], tokens: Int[Array, "B T"], near: Pattern
) -> Float[Array, "B T E"]:
    """Hidden states after the last norm, each head's attention between full (gate 1) and `near` (gate 0).

    Layers with a window of their own are as pretrained, whatever their gates. Of each layer only its input is kept for
    a backward pass.

    Raises:
      ValueError: as `far_layers`.
    """
    far = far_layers(model.config)
    context = SequenceContext.from_start(*tokens.shape)

    @jax.checkpoint
    def gated(block: Block, x: Array, gate: Array) -> Array:
        q, k, v = block.project(x, context)

        def heads(pattern: Pattern) -> Float[Array, "B T H D"]:
            config, slopes = block.attention.config, block.attention.slopes()
            scale, softcap = config.softmax_scale, config.softcap
            sinks = block.attention.learned_sinks()
            return sequence_attention(q, k, v, pattern, scale=scale, softcap=softcap, slopes=slopes, sink_logits=sinks)

        share = jnp.repeat(gate, block.mixer.config.group_size)[:, None]
        return block.combine(x, share * heads(Full()) + (1 - share) * heads(near))

    x = model.embed(tokens)
    for i in range(model.config.num_layers):
        block = model.layer(i)
        x = gated(block, x, gates[i]) if far[i] else block.parallel(x, context)[0]
    return model.norm(x)


def gate_loss(
    gates: Float[Array, "L K"], model: Decoder, batch: Mapping[str, Array], near: Pattern, l1: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss, and the distance in it.

    The distance is the squared difference between the gated and the full model's last hidden states at the tokens
    before answer tokens, as a share of the full model's squared hidden states there. The penalty is `l1` times the mean
    gate of the layers that have gates. (The paper has plain sums; with a share and a mean one `l1` suits models and
    rows of any size, whatever the weights of the last norm.)

    Args:
      gates: of all layers; those of layers with windows have no influence on the distance.
      model: the model, which gets no gradient.
      batch: tokens, int32 [B, T], and answers, bool [B, T], true where the next token is of an answer.
      near: what a head with a gate of 0 sees.
      l1: weight of the penalty.
    """
    model = jax.lax.stop_gradient(model)
    tokens, answers = batch["tokens"], batch["answers"]
    full, gated = model.hidden(tokens), gated_hidden(model, gates, tokens, near)
    dtype = accumulator(full.dtype)

    def total(x: Array) -> Float[Array, ""]:
        return jnp.sum(jnp.where(answers[..., None], jnp.square(x), 0.0))

    whole = total(full.astype(dtype))
    distance = total(gated.astype(dtype) - full.astype(dtype)) / jnp.where(whole > 0, whole, 1.0)
    penalty = l1 * jnp.mean(jnp.abs(gates[np.flatnonzero(far_layers(model.config))]))
    return distance + penalty, distance


def optimise_gates(
    model: Decoder, batches: Iterable[Mapping[str, np.ndarray | Array]], config: GateConfig
) -> Iterator[GateStep]:
    """Optimise the gates of a model, one step at a time; whoever reads the steps may stop anywhere.

    Args:
      model: stays as it is.
      batches: see `gate_loss`; they should not end before the steps do.
      config: how.

    Raises:
      ValueError: as `far_layers`; rows that are no longer than sinks and recent tokens together.
    """
    gates = jnp.asarray(
        np.repeat(far_layers(model.config)[:, None], model.config.blocks[0].attention.num_kv_heads, 1), jnp.float32
    )
    optimizer = optax.adam(config.schedule)

    @partial(jax.jit, donate_argnums=1)
    def advance(
        gates: Array, moments: optax.OptState, model: Decoder, batch: Mapping[str, Array]
    ) -> tuple[GateStep, optax.OptState]:
        measured = partial(gate_loss, model=model, batch=batch, near=config.near, l1=config.l1)
        (loss, distance), gradient = jax.value_and_grad(measured, has_aux=True)(gates)
        updates, moments = optimizer.update(gradient, moments)
        return GateStep(jnp.clip(gates + updates, 0.0, 1.0), loss, distance), moments

    moments = optimizer.init(gates)
    for _, batch in zip(range(config.steps), batches, strict=False):
        length, seen = batch["tokens"].shape[1], config.sinks + config.recent
        if length <= seen + 1:
            raise ValueError(f"rows of {length} tokens: more are needed than {seen} sinks and recent ones")
        step, moments = advance(gates, moments, model, {name: jnp.asarray(x) for name, x in batch.items()})
        gates = step.gates
        yield step


@runtime_checkable
class Rows(Protocol):
    """A random-access source of rows to train on; `weights` is 1 where the target is of an answer."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def answer_batches(rows: Rows, batch_size: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Batches for `optimise_gates` without end, of the rows from `start` on that have an answer.

    Args:
      rows: such as `streamjax.data.recall.training_rows.RecallRows`.
      batch_size: rows in a batch.
      start: index of the first row.

    Raises:
      ValueError: a thousand rows one after another have no answer.
    """
    found: list[dict[str, np.ndarray]] = []
    index = newest = start
    while True:
        row = rows[index]
        index += 1
        if (row["weights"] == 1).any():
            newest = index
            found.append({"tokens": row["tokens"], "answers": row["weights"] == 1})
        elif index - newest >= _FRUITLESS_ROWS:
            raise ValueError(f"rows of {len(row['tokens'])} tokens hold no question with its answer: use longer ones")
        if len(found) == batch_size:
            yield {name: np.stack([x[name] for x in found]) for name in ("tokens", "answers")}
            found = []
