"""The loss of a batch and its gradient, in several orders that give the same numbers for different memory.

"full" keeps every activation; "remat" each layer's input (gradient checkpointing, 1604.06174); "layer" and "chunk" cut
the sequence (`layer_order.py`, `chunk_order.py`). Logits exist for a part of the sequence at a time in all of them.
"auto" takes the fastest that the memory allows (`method_choice.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.context.sequence import Exchange
from streamjax.attention.sharded import context_shards
from streamjax.models.config import ExpertsConfig, ModelConfig
from streamjax.models.decoder import Decoder, require_looking_ahead
from streamjax.models.mixers.handed_on.learned_bounds import table_gradient, with_bounds
from streamjax.training.backprop import chunk_order, layer_order
from streamjax.training.backprop.context import chunk_pipeline
from streamjax.training.backprop.context.stretch import Stretch
from streamjax.training.backprop.embedding_and_head import default_logits_chunk
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.gradient_reduction import batch_axes, over_rows
from streamjax.training.backprop.head.whole_sequence import whole_sequence_loss
from streamjax.training.backprop.planning.host_transfers import Rates, hidden_fraction
from streamjax.training.backprop.planning.memory_model import DEFAULT_CHUNK, split_evenly
from streamjax.training.backprop.planning.method_choice import WHOLE_METHODS, Choice, choose, device_memory_bytes
from streamjax.training.backprop.planning.shared_sequences import how_shared, shared_chunk
from streamjax.training.backprop.routing import with_routing_total
from streamjax.training.backprop.sequence_chunks import ChunkedSequence
from streamjax.training.backprop.storage.landmark_memory import whole_pages
from streamjax.training.backprop.trainable_parameters import Trainable, combine, partition
from streamjax.training.elimination.kept_tokens import TokenElimination, hidden_of_kept
from streamjax.training.objectives.objective import CrossEntropy, Objective, is_known, require_arrays

Batch = Mapping[str, Array]
Method = Literal["full", "remat", "layer", "chunk", "auto"]
METHODS: tuple[str, ...] = get_args(Method)


def check_method(method: str) -> None:
    """Raise ValueError unless `method` is one that there is."""
    if method not in METHODS:
        raise ValueError(f"unknown backprop method {method!r}; use one of {', '.join(METHODS)}")


def loss_and_grad(
    model: Decoder,
    batch: Mapping[str, Array | np.ndarray],
    method: str = "full",
    *,
    objective: Objective | None = None,
    chunk_size: int | None = None,
    segment: int = 1,
    offload: Literal["host"] | None = None,
    offload_fraction: float = 1.0,
    kv_grad_dtype: Any = None,
    grad_dtype: Any = None,
    logits_chunk: int | None = None,
    memory_bytes: int | None = None,
    trainable: Trainable = nnx.Param,
    context_exchange: Exchange = "auto",
    keep_attention: bool = False,
    elimination: TokenElimination | None = None,
) -> tuple[Float[Array, ""], Decoder]:
    """Loss of a batch, and its gradient: the same with every method, but for rounding.

    Args:
      model: the model.
      batch: tokens, targets int32 [B, T] and weights float32 [B, T]; segment_ids and positions int32 [B, T] if packed;
        prefix int32 [B], tokens of a row that layers of prefix linear attention look at first (`sj.forward`);
        what else the objective asks for.
      method: "full" keeps all activations, "remat" the inputs of layers, "layer" too, but cuts the sequence into chunks
        inside each layer; "chunk" keeps keys and values alone and cuts it into chunks of all layers; "auto" takes
        the fastest that fits (`method_choice.py`), with `keep_attention` where there is room for it, a `segment` and an
        offload where it needs them.
      objective: what is minimised; `CrossEntropy()` where None, the weighted mean over tokens in nats.
      chunk_size: tokens of a chunk; at most T. 2048, or T where that is less, where None. Rounded up to whole pages
        where the model has a chunk memory.
      segment: with "layer", layers from one kept input to the next; those between are computed again.
      offload: "host" moves the kept inputs of "layer" to the host's memory.
      offload_fraction: the share of them that is moved.
      kv_grad_dtype: in which gradients of keys and values are summed over chunks; float32 (float64 for a float64
        model) where None.
      grad_dtype: in which gradients of parameters are summed over chunks; float32 (float64) where None. They are all
        there at once with "chunk", one layer's with "layer".
      logits_chunk: tokens of a row whose logits exist at once; by default as many as make 256 MiB.
      memory_bytes: what "auto" may use of a device's memory, parameters and gradients included; all that the device has
        where None, or the free memory of a CPU's machine.
      trainable: the type of parameters that get a gradient; the others are constants, and None in the result.
      context_exchange: how devices that share a sequence, along the mesh axis `context`, come to each other's keys
        with "full" and "remat": "ring", "gather", or "auto", which gathers up to 256 MiB (docs/sharding.md).
      keep_attention: with "remat" and "layer", what attention found is kept too, as much again as the inputs of layers
        (in the dtype of sums): the backward pass computes everything of a layer again but that (DistFlashAttn,
        2310.03294). For long rows, where attention is most of the work; with "remat", short ones, whose logits exist
        at once, have nothing to keep. "layer" offloads it with the inputs.
      elimination: layers compute the tokens that it keeps alone (LeMo): the gradient is that of this other function.
        With "full" and "remat", whose layers see a whole row at once.

    Returns:
      The loss, float32 (float64 for a float64 model), and the gradient, shaped as the model. The gradient has that of
      routing losses in it (`ExpertsConfig.balance_loss`, `z_loss`), the loss does not. Shares of choices in the
      balancing loss are those of a chunk with "layer" and "chunk".

    Raises:
      ValueError: an unknown method or option, or a batch that makes no sense: an array is missing, a chunk is longer
        than the sequence, no token counts, a target is not in the vocabulary. Values are checked where they are known:
        not under `jax.jit`. With "auto": nothing fits, or what it chooses was given.
    """
    check_method(method)
    objective = CrossEntropy() if objective is None else objective
    objective.check(batch, model.config.vocab_size)
    length = batch["tokens"].shape[1]
    if chunk_size is not None and not 1 <= chunk_size <= length:
        raise ValueError(f"chunk_size is {chunk_size}: use 1 to {length}, the length of the batch's sequences")
    if memory_bytes is not None and method != "auto":
        raise ValueError(f'memory_bytes is for method "auto", and not for {method!r}')
    if method == "auto":
        check_free(segment, offload, keep_attention)
        found = choice_for(
            model,
            *batch["tokens"].shape,
            memory_bytes=device_memory_bytes() if memory_bytes is None else memory_bytes,
            chunk_size=chunk_size,
            trainable=trainable,
            kv_grad_dtype=kv_grad_dtype,
            grad_dtype=grad_dtype,
            logits_chunk=logits_chunk,
        ).arguments
        method, segment, offload = found["method"], found.get("segment", 1), found.get("offload")
        offload_fraction = found.get("offload_fraction", 1.0)
        keep_attention = elimination is None and found.get("keep_attention", False)
    if segment < 1:
        raise ValueError(f"segment is {segment}: at least 1 layer is needed")
    if segment > 1 and method != "layer":
        raise ValueError(f'segment is {segment}, which method "layer" has and {method!r} has not')
    if not 0.0 <= offload_fraction <= 1.0:
        raise ValueError(f"offload_fraction is {offload_fraction}: use 0 to 1")
    if offload is not None and (offload != "host" or method != "layer"):
        raise ValueError(f'offload is {offload!r} with method {method!r}: only "layer" offloads, to "host"')
    if keep_attention:
        check_keeping(method, segment)
        if elimination is not None:
            raise ValueError("keep_attention is not for layers that leave tokens out (lemo.share): set it to False")
    if elimination is not None:
        _check_elimination(method, length)
    size = whole_pages(model.config, min(chunk_size or DEFAULT_CHUNK, length))
    if "prefix" in batch:
        check_prefix(model.config, batch, None if method in WHOLE_METHODS else size, elimination)
    loss, grads = _loss_and_grad(
        with_routing_total(model, batch["tokens"].size),
        {name: jnp.asarray(x) for name, x in batch.items()},
        method,
        objective,
        size,
        GradientOptions(
            logits_chunk=logits_chunk or default_logits_chunk(model, batch["tokens"].shape[0]),
            trainable=trainable,
            segment=segment,
            offload=offload,
            offload_fraction=offload_fraction,
            grad_dtype=None if grad_dtype is None else jnp.dtype(grad_dtype),
            kv_grad_dtype=jnp.dtype(accumulator(model.dtype) if kv_grad_dtype is None else kv_grad_dtype),
            context_exchange=context_exchange,
            keep_attention=keep_attention,
        ),
        elimination,
    )
    return loss, with_routing_total(grads, None)


def _check_elimination(method: str, length: int) -> None:
    """Raise ValueError for what cannot leave tokens out."""
    if method not in WHOLE_METHODS:
        raise ValueError(
            f'method {method!r} cuts rows into chunks, and a layer chooses its tokens from a whole row: use "remat" or '
            '"full", or compute all tokens (lemo.share=1.0)'
        )
    if context_shards(length) > 1:
        raise ValueError("a layer chooses its tokens from a whole row, which the mesh axis context splits: set it to 1")


def check_prefix(
    config: ModelConfig,
    batch: Mapping[str, Array | np.ndarray],
    chunk_size: int | None,
    elimination: TokenElimination | None,
) -> None:
    """Raise ValueError unless layers can look at the prefixes of a batch; chunk_size: None where rows stay whole."""
    require_looking_ahead(config, batch.get("segment_ids"))
    require_arrays(batch, (), ("prefix",))
    if elimination is not None:
        raise ValueError("a prefix is looked at whole, and layers leave tokens out: set lemo.share to 1.0")
    if chunk_size is not None and context_shards(batch["tokens"].shape[1]) > 1:
        raise ValueError('a prefix over the mesh axis context is for the methods "full" and "remat": use one of these')
    longest = int(np.max(batch["prefix"], initial=0)) if is_known(batch["prefix"]) else 0
    if chunk_size is not None and longest > chunk_size:
        raise ValueError(
            f"a prefix has {longest} tokens and a chunk {chunk_size}, and the first chunk must have all of it: use "
            f'chunk_size={longest} or more, or method "remat"'
        )


def check_keeping(method: str, segment: int) -> None:
    """Raise ValueError unless the method can keep what attention found."""
    if method not in ("remat", "layer"):
        raise ValueError(f'keep_attention is for the methods "remat" and "layer", and not for {method!r}')
    if segment > 1:
        raise ValueError(f"keep_attention needs the input of every layer, and segment is {segment}: set it to 1")


def check_free(segment: int, offload: str | None, keep_attention: bool) -> None:
    """Raise ValueError unless what "auto" chooses is left to it."""
    given = {"segment": segment, "offload": offload, "keep_attention": keep_attention}
    if given != {"segment": 1, "offload": None, "keep_attention": False}:
        values = ", ".join(map(str, given.values()))
        raise ValueError(f'method "auto" chooses {", ".join(given)}, which are {values}: leave them out')


def choice_for(
    model: Decoder, rows: int, length: int, *, memory_bytes: int, trainable: Trainable = nnx.Param, **known: Any
) -> Choice:
    """What "auto" takes for `rows` sequences of `length` tokens and this model, under the mesh that is set.

    known: the other arguments of `choose`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {} if mesh.empty else dict(mesh.shape)
    split = () if mesh.empty else batch_axes(mesh, rows)
    leaves = jax.tree.leaves(partition(model, trainable)[0])
    experts = any(isinstance(block.mlp, ExpertsConfig) for block in model.config.blocks)  # most of the parameters
    shards = context_shards(length)
    return choose(
        model.config,
        batch_size=rows // math.prod(axes[name] for name in split),
        length=length // shards,
        memory_bytes=memory_bytes,
        platform=jax.default_backend(),
        stacked=len(model.stack) > 0,
        dtype=model.dtype,
        param_dtype=model.embedding.dtype,
        shards=axes.get("fsdp", 1) * axes.get("tensor", 1) * (axes.get("expert", 1) if experts else 1),
        tensor=axes.get("tensor", 1) if split_evenly(model.config, axes.get("tensor", 1)) else 1,
        context=shards,
        trained=sum(leaf.size for leaf in leaves) / model.config.parameter_count,
        **known,
    )


def offload_fraction_for(
    model: Decoder,
    rows: int,
    length: int,
    *,
    rates: Rates,
    host_bytes: float,
    chunk_size: int | None = None,
    keep_attention: bool = False,
) -> float:
    """What `hidden_fraction` says of `rows` sequences of `length` tokens and this model, under the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = {} if mesh.empty else dict(mesh.shape)
    split = () if mesh.empty else batch_axes(mesh, rows)
    return hidden_fraction(
        model.config,
        rates,
        batch_size=rows // math.prod(axes[name] for name in split),
        length=length,
        host_bytes=host_bytes,
        chunk_size=chunk_size,
        keep_attention=keep_attention,
        item=jnp.dtype(model.dtype).itemsize,
        shards=axes.get("tensor", 1),
    )


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _loss_and_grad(
    model: Decoder,
    batch: Batch,
    method: str,
    objective: Objective,
    chunk_size: int,
    options: GradientOptions,
    elimination: TokenElimination | None,
) -> tuple[Float[Array, ""], Decoder]:
    prepared, stored = objective.prepare(batch), model
    model = with_bounds(model)
    params, rest = partition(model, options.trainable)
    if method in ("layer", "chunk"):
        order = layer_order.loss_and_grad if method == "layer" else chunk_order.loss_and_grad
        length = batch["tokens"].shape[1]
        devices = context_shards(length)
        shared = how_shared(model.config, len(model.stack) > 0, method, devices)
        if shared is not None:
            chunk_size = shared_chunk(model.config, method, length, chunk_size, devices)
        if shared in ("stages", "branches"):
            order = chunk_pipeline.loss_and_grad

        def compute(model: Decoder, batch: Batch, prepared: Batch, split: Any, reduction: Any) -> Any:
            sequence = ChunkedSequence.cut(batch, prepared, chunk_size)
            if shared == "stretches":
                sequence = Stretch.of(sequence, options.context_exchange)
            return order(model, sequence, objective, options, split, reduction)

        value, grads = over_rows(compute, model, batch, prepared, params, objective.rows, shared)
        if "prefix" in batch:  # of which lengths are not known before, under `jax.jit`
            value = jnp.where(jnp.any(batch["prefix"] > chunk_size), jnp.nan, value)
        return value, table_gradient(stored, grads)

    def loss(params: Decoder) -> Array:
        whole = combine(params, rest), batch, prepared, objective, options.logits_chunk
        return whole_loss(
            *whole, method == "remat", options.context_exchange, elimination, keep_attention=options.keep_attention
        )

    value, grads = jax.value_and_grad(loss)(params)
    return value, table_gradient(stored, grads)


def whole_loss(
    model: Decoder,
    batch: Batch,
    prepared: Batch,
    objective: Objective,
    logits_chunk: int,
    remat: bool = False,
    exchange: Exchange = "auto",
    elimination: TokenElimination | None = None,
    *,
    keep_attention: bool = False,
) -> Float[Array, ""]:
    """The loss by one pass over the whole sequence, for `jax.grad`."""
    known = {name: batch.get(name) for name in ("positions", "segment_ids")}
    if elimination is None:
        known["prefix"] = batch.get("prefix")
        hidden = model.hidden(batch["tokens"], **known, remat=remat, keep_attention=keep_attention, exchange=exchange)
    else:
        hidden = hidden_of_kept(model, elimination, batch["tokens"], **known, remat=remat)
    return whole_sequence_loss(model, hidden, prepared, objective, logits_chunk)


def loss_sum(model: Decoder, batch: Batch, *, logits_chunk: int | None = None) -> Float[Array, ""]:
    """Weighted sum of the negative log-likelihoods of a batch, in nats."""
    size = logits_chunk or default_logits_chunk(model, batch["tokens"].shape[0])
    objective = CrossEntropy()
    return whole_loss(model, batch, objective.prepare(batch), objective, size) * objective.count(batch)
