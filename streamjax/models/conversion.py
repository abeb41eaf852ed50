"""Changing the token mixers of a pretrained model: attention becomes a recurrence, a window, or both.

Whoever turns a Transformer into something cheaper to stream begins so (MOHAWK, 2408.10189; LoLCATs, 2410.10254;
InfiniteVL, 2512.08829): what the new mixer has in common with attention is carried over, all else of the layer stays,
and training brings the rest (`training/distillation`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig, BlockConfig, GatedDeltaConfig, ModelConfig, SSDConfig
from streamjax.models.config.block import RecurrentMixerConfig
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import stack_layers, unstack_layers, with_layers
from streamjax.models.mixers.attention import Attention
from streamjax.models.mixers.gated_delta import GatedDelta
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.models.mixers.ssd import SSD


class ConvertedParam(nnx.Param):
    """A parameter of a converted layer's mixers: `loss_and_grad(..., trainable=ConvertedParam)` trains these alone."""


def converted_config(
    config: ModelConfig,
    layers: Sequence[int],
    recurrent: RecurrentMixerConfig | None = None,
    window: int | None = None,
    sinks: int = 0,
) -> ModelConfig:
    """The model with other mixers in some layers; see `convert_layers`.

    Raises:
      ValueError: one line: a layer that is not there, or has no plain attention to be changed.
    """
    if recurrent is None and window is None:
        raise ValueError("a layer becomes a recurrent mixer, a window, or both: give recurrent or window")
    if sinks and window is None:
        raise ValueError(f"sinks is {sinks}, and they stand in front of a window: give window, too")
    blocks = list(config.blocks)
    for index in layers:
        if not 0 <= index < config.num_layers:
            raise ValueError(f"layers names layer {index} of a model that has {config.num_layers}")
        blocks[index] = _converted(blocks[index], index, recurrent, window, sinks)
    return config.replace(blocks=tuple(blocks))


def _converted(
    block: BlockConfig, index: int, recurrent: RecurrentMixerConfig | None, window: int | None, sinks: int
) -> BlockConfig:
    if _is_converted(block, recurrent, window, sinks):
        return block
    if not isinstance(block.mixer, AttentionConfig) or block.beside is not None:
        raise ValueError(f"layers names layer {index}, which has no attention alone: it cannot become another mixer")
    if block.handed_on or block.received:
        raise ValueError(f"layers names layer {index}, which shares keys with others: it cannot become another mixer")
    if recurrent is not None and (recurrent.handed_on or recurrent.received):
        raise ValueError("recurrent hands something on, or takes it: such a mixer cannot take attention's place")
    if recurrent is not None and recurrent.bounds_shape:
        raise ValueError("recurrent has learned bounds, which all layers of a model share: give lower_bound a number")
    if recurrent is not None and window is None:
        return dataclasses.replace(block, mixer=recurrent)
    return dataclasses.replace(block.with_mixer(window=window, sinks=sinks, chunk=None), beside=recurrent)


def _is_converted(block: BlockConfig, recurrent: RecurrentMixerConfig | None, window: int | None, sinks: int) -> bool:
    """Whether a layer has these mixers already."""
    if window is None:
        return block.mixer == recurrent
    return block.beside == recurrent and (block.mixer.window, block.mixer.sinks) == (window, sinks)


def convert_layers(
    model: Decoder,
    layers: Sequence[int],
    *,
    recurrent: RecurrentMixerConfig | None = None,
    window: int | None = None,
    sinks: int = 0,
    key: Array | None = None,
) -> Decoder:
    """The model with other token mixers in some layers; its other arrays are the same ones.

    With `recurrent` alone a recurrent mixer takes attention's place: Gated DeltaNet and Mamba-2 with heads as wide as
    attention's begin with its queries, keys, values and output, and all else is drawn. With `window` alone attention
    sees the newest tokens. With both the recurrent mixer stands beside the window, and its
    output begins at zero. Layers that have these mixers already stay as they are.

        student = convert_layers(model, (3, 7), recurrent=GatedDeltaConfig(9, 9, key_dim=64, value_dim=64))

    Args:
      model: any decoder without quantised weights.
      layers: which of its layers.
      recurrent: the mixer in attention's place, or beside it.
      window: a key is visible at a distance below this.
      sinks: so many first tokens are visible behind a window, too.
      key: of what is drawn; `jax.random.key(0)` where None.

    Raises:
      ValueError: one line: no mixer is given, a layer is not there, or has no attention alone.
    """
    config = converted_config(model.config, layers, recurrent, window, sinks)
    key = jax.random.key(0) if key is None else key
    plain, blocks = unstack_layers(model), []
    for index, new in enumerate(config.blocks):
        old = plain.layers[index]
        changed = new != model.config.blocks[index]
        blocks.append(_block(old, new, model, jax.random.fold_in(key, index)) if changed else old)
    student = with_layers(plain, [], blocks)
    student.config = config
    return stack_layers(student) if len(model.stack) else student


def mark_converted(model: Decoder, layers: Sequence[int], recurrent_only: bool = False) -> Decoder:
    """The model with `ConvertedParam` in the mixers of some layers, for `trainable=`; one module a layer.

    With `recurrent_only` attention beside a recurrent mixer stays as it is.
    """
    plain = unstack_layers(model)
    blocks = [_marked(block, recurrent_only) if i in layers else block for i, block in enumerate(plain.layers)]
    return with_layers(plain, [], blocks)


def _marked(block: Block, recurrent_only: bool) -> Block:
    named = [name for name in ("mixer", "beside") if isinstance(getattr(block, name), RecurrentMixer)]
    names = named if recurrent_only else ["mixer", "beside"]

    def mark(path: tuple[Any, ...], node: Any) -> Any:
        mixes = path and getattr(path[0], "name", None) in names
        if not mixes or not isinstance(node, nnx.Param):
            return node
        return ConvertedParam(node.get_value(), **node.get_metadata())

    is_leaf = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree_util.tree_map_with_path(mark, block, is_leaf=is_leaf)


def _block(old: Block, config: BlockConfig, model: Decoder, key: Array) -> Block:
    """A layer with the parts of `old` that the new one has, too."""
    attention = old.mixer
    assert isinstance(attention, Attention)
    handed = model.config.d_model, model.config.layer_inputs
    make = partial(Block, config, model.config.d_model, dtype=jnp.dtype(model.embedding.dtype), handed=handed)
    new = jax.jit(lambda key: make(key=key))(key)
    for name in ("mixer_norm", "mlp", "mlp_norm", "mixer_post_norm", "mlp_post_norm", "layer_input", "scale"):
        setattr(new, name, getattr(old, name))
    if isinstance(new.mixer, Attention):
        new.mixer.projections, new.mixer.sink_logits = attention.projections, attention.sink_logits
        if new.beside is not None:
            _carry_over(attention, new.beside)
            new.beside.out[...] = jnp.zeros_like(new.beside.out[...])
    else:
        assert isinstance(new.mixer, RecurrentMixer)
        _carry_over(attention, new.mixer)
    return new


def _carry_over(attention: Attention, mixer: RecurrentMixer) -> None:
    """Give a recurrent mixer attention's projections, where its heads have the same width and number."""
    c, a = mixer.config, attention.config
    if isinstance(c, GatedDeltaConfig) and isinstance(mixer, GatedDelta):
        widths, order = (c.key_dim, c.value_dim), ("q", "k", "v")
    elif isinstance(c, SSDConfig) and isinstance(mixer, SSD):
        widths, order = (c.state_dim, c.head_dim), ("v", "k", "q")
    else:
        return
    if c.num_heads != a.num_heads or set(widths) != {a.head_dim} or a.output_gate or a.value_is_key:
        return
    q, k, v = (x.astype(mixer.inside.dtype) for x in _heads(attention))
    shared = c.group_size
    parts = {"q": q[:, ::shared], "k": k[:, ::shared], "v": v.reshape(v.shape[0], c.num_groups, -1)}
    kernel = jnp.concatenate([parts[name] for name in order], axis=-1)
    mixer.inside[...] = mixer.inside[...].at[..., : kernel.shape[-1]].set(kernel)
    mixer.out[...] = attention.projections.out[...].reshape(mixer.out.shape).astype(mixer.out.dtype)
    # What a token sees of itself; a convolution that is drawn would mix what attention keeps apart.
    mixer.conv.weight[...] = jnp.zeros_like(mixer.conv.weight[...]).at[-1].set(1.0)


def _heads(attention: Attention) -> tuple[Float[Array, "E H D"], Float[Array, "E H D"], Float[Array, "E H D"]]:
    """Kernels of queries, keys and values, each for every query head."""
    group = attention.config.group_size
    qkv = attention.projections.qkv[...]
    q = qkv[:, :, :group].reshape(qkv.shape[0], -1, qkv.shape[-1])
    return q, jnp.repeat(qkv[:, :, group], group, axis=1), jnp.repeat(qkv[:, :, group + 1], group, axis=1)
