"""What output tokens cost where a model reads and writes at once: over whole rows, at given positions (2505.16983)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import add_sink_logits
from streamjax.attention.dense import attend
from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import Attention, SequenceContext
from streamjax.training.simultaneous.grouped_rows import GroupedRows


def group_positions(outputs: Bool[Array, "B T"] | np.ndarray, first_output: int = 0) -> Int32[Array, "B T"]:
    """Each token's place among those of its group, the output's counted from `first_output`.

    Example:
      >>> group_positions(jnp.array([[False, False, True, False, True]]), 10).tolist()
      [[0, 1, 10, 2, 11]]
    """
    outputs = jnp.asarray(outputs)
    counts = jnp.where(outputs, jnp.cumsum(outputs, axis=1) + first_output, jnp.cumsum(~outputs, axis=1))
    return (counts - 1).astype(jnp.int32)


def grouped_hidden(
    model: Decoder,
    tokens: Int32[Array, "B T"],
    outputs: Bool[Array, "B T"],
    position: Int32[Array, "B T"] | np.ndarray | None = None,
    mutual: bool | Bool[Array, ""] | np.bool_ = False,
) -> Float[Array, "B T E"]:
    """Hidden states after the last norm, over rows in the order in which their tokens come.

    Output tokens see all that came before them; source tokens see the source, and outputs too if `mutual`. The same as
    a stream of `init_groups` computes. Every logit of a layer exists at once, and only layers' inputs are kept for the
    backward pass: rows are as short as a sentence or a few.

    Args:
      model: all of whose layers have full attention.
      tokens, outputs: as in `GroupedRows`.
      position: of each token; `group_positions(outputs)` where None.
      mutual: whether source tokens see outputs.

    Raises:
      ValueError: a model with other layers.
    """
    if model.config.hsa is not None:
        raise ValueError("a model with a chunk memory cannot read groups of tokens: its pages have one order")
    for i, block in enumerate(model.config.blocks):
        mixer = block.mixer
        plain = isinstance(mixer, AttentionConfig) and not mixer.alibi_slopes and mixer.keys_of is None
        if not plain or mixer.window is not None or mixer.chunk is not None or block.beside is not None:
            raise ValueError(f"layer {i} has no full attention at rotated positions: {type(mixer).__name__}")
    place = jnp.arange(tokens.shape[1])
    position = group_positions(outputs) if position is None else jnp.asarray(position)
    visible = (place[:, None] >= place) & (mutual | outputs[:, :, None] | ~outputs[:, None, :])
    context = SequenceContext(position.astype(jnp.uint32), None, tokens.shape[1])

    @jax.checkpoint
    def layer(block: Block, x: Array) -> Array:
        mixer = block.mixer
        assert isinstance(mixer, Attention)
        q, k, v = block.project(x, context)
        config = mixer.config
        heads = attend(
            q, k.swapaxes(1, 2), v.swapaxes(1, 2), visible[:, None], scale=config.softmax_scale, softcap=config.softcap
        )  # fmt: skip
        return block.combine(x, add_sink_logits(heads, mixer.learned_sinks()).out)

    x = model.embed(tokens)
    for i in range(model.config.num_layers):
        x = layer(model.layer(i), x)
    return model.norm(x)


def grouped_nats(
    model: Decoder,
    rows: GroupedRows,
    position: Int32[Array, "B T"] | np.ndarray | None = None,
    mutual: bool | Bool[Array, ""] | np.bool_ = False,
) -> Float[Array, "B T"]:
    """What each target costs, in nats; 0 where there is none. Arguments as in `grouped_hidden`."""
    tokens, outputs, targets = (jnp.asarray(x) for x in rows)
    logits = model.logits(grouped_hidden(model, tokens, outputs, position, mutual))
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)


def grouped_loss(
    model: Decoder,
    rows: GroupedRows,
    position: Int32[Array, "B T"] | np.ndarray | None = None,
    mutual: bool | Bool[Array, ""] | np.bool_ = False,
) -> Float[Array, ""]:
    """Nats an output token, on average over all targets of the rows; differentiable in the model.

    Example:
      >>> from streamjax.training.simultaneous.grouped_rows import wait_k_rows
      >>> rows = wait_k_rows([([1, 2, 3, 4], [5, 6, 7])], wait=3)
      >>> loss, slope = jax.jit(jax.value_and_grad(grouped_loss))(model, rows)
    """
    nats = grouped_nats(model, rows, position, mutual)
    return jnp.sum(nats) / jnp.maximum(jnp.sum(jnp.asarray(rows.targets) >= 0), 1)
