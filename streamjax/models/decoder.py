"""The decoder: one NNX module for every architecture that `ModelConfig` describes.

A `Decoder` is a pytree of parameters; nothing in it changes while it runs. It can be passed to plain `jax.jit`,
`jax.grad` and `lax.scan`. Layers lie in one of two layouts: one module a layer (`layers`), which decoding reads without
copies, or stacked by the period in which layers repeat (`stack`), which a scan walks and which compiles fast at any
depth. The two hold the same numbers; `unstack` and `stack_layers` convert.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.partial import ATTENTION_OUTPUT, accumulator
from streamjax.attention.context.sequence import Exchange
from streamjax.barriers import ordered_after
from streamjax.kv.cache import Cache, Deferred, take_in
from streamjax.kv.layer_caches.slots_of import SlotsOf
from streamjax.kv.query import State
from streamjax.models.block import Block
from streamjax.models.config import ModelConfig, UniformConfig, expanded
from streamjax.models.layer_inputs import LayerInputs
from streamjax.models.mixers.attention import ChunkContext, SequenceContext
from streamjax.models.mixers.handed_on.learned_bounds import LearnedBounds, with_bounds
from streamjax.models.mixers.hierarchical import ReadablePages
from streamjax.models.norms import LastNorm, Norm
from streamjax.models.parameters import kernel, product, zeros
from streamjax.models.quantisation import take_rows
from streamjax.parallel.rules import constrain


def default_dtype() -> jnp.dtype:
    """bfloat16 on TPU and GPU, float32 on CPU."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
      config: shapes and choices.
      key: PRNG key of the initial weights; under `jax.eval_shape` nothing is drawn.
      dtype: of activations; `default_dtype()` where None.
      param_dtype: of parameters; `dtype` where None.
      scan_layers: stack repeating layers (see the module's text).

    Example:
      >>> config = sj.UniformConfig(
      ...     vocab_size=259, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128
      ... )
      >>> shapes = jax.eval_shape(lambda key: sj.Decoder(config, key), jax.random.key(0))  # without memory
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
      107200
    """

    def __init__(
        self,
        config: ModelConfig | UniformConfig,
        key: Array,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        scan_layers: bool = False,
    ):
        config = expanded(config)
        self.config = config
        self.dtype = jnp.dtype(dtype or default_dtype())
        params = jnp.dtype(param_dtype or self.dtype)
        key_embed, key_head, key_layers = jax.random.split(key, 3)
        d, vocab = config.d_model, config.vocab_size
        self.embedding = kernel(key_embed, (vocab, d), ("vocab", "embed"), d, params, inputs=(1,))
        keys = jax.random.split(key_layers, config.num_layers)
        period = config.period
        repeats = config.repeats if scan_layers else 0

        gain = 1.0 / math.sqrt(2 * config.num_layers)

        def build(index: int, key: Array) -> Block:
            memory = None if config.hsa is None else (config.hsa, config.remembers(index), config.reads(index))
            handed = config.handed_at(index), config.layer_inputs
            return Block(config.blocks[index], d, key, params, gain, memory, handed)

        self.stack = nnx.List(
            [jax.vmap(partial(build, i))(keys[i : repeats * period : period]) for i in range(period)] if repeats else []
        )
        self.layers = nnx.List([build(i, keys[i]) for i in range(repeats * period, config.num_layers)])
        self.norm = (LastNorm if config.stream_width > d else Norm)(d, config.norm, params)
        self.embedding_norm = None if config.embedding_norm is None else Norm(d, config.embedding_norm, params)
        own, key_inputs = config.blocks[0].layer_input, jax.random.fold_in(key, 1)
        sizes = vocab, d, config.layer_inputs
        self.layer_inputs = None if own is None else LayerInputs(*sizes, own.channels, config.norm, key_inputs, params)
        self.bounds = LearnedBounds(config.bounds_shape, params) if config.bounds_shape else None
        self.head = None if config.tie_embeddings else kernel(key_head, (d, vocab), ("embed", "vocab"), d, params)
        self.head_bias = zeros((vocab,), ("vocab",), params) if config.logit_bias else None

    @property
    def stacked_layers(self) -> int:
        """How many of the layers lie in the stack (the first ones)."""
        return self.config.num_layers - len(self.layers)

    @property
    def streamed(self) -> ModelConfig:
        """The configuration of all layers that keep something of a stream."""
        return self.config

    @property
    def by_layers(self) -> bool:
        """Whether streams can be read layer by layer: no layer reads what another one remembers."""
        return self.config.reads_layerwise

    @property
    def remembered(self) -> int | None:
        """The layer whose old tokens a side network recalls (`models.side_network`), if there is one."""
        return None

    def layer(self, index: int) -> Block:
        """Layer `index` as a module of its own; a slice where it lies in the stack."""
        block, row = self.layer_and_row(index)
        return block if row is None else jax.tree.map(lambda leaf: leaf[row], block)

    def layer_and_row(self, index: int) -> tuple[Block, int | None]:
        """The module that has layer `index`, and where it lies in it, if that is a stack of layers."""
        if index >= self.stacked_layers:
            return self.layers[index - self.stacked_layers], None
        row, column = divmod(index, len(self.stack))
        return self.stack[column], row

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """Token embeddings, scaled as the config says; behind them layers' inputs, and zeros for what is handed on."""
        return self.enter(take_rows(self.embedding[...], tokens, self.dtype), tokens)

    def enter(self, x: Float[Array, "B T E"], tokens: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """What the first layer reads of tokens, from their rows of the embedding."""
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, self.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.layer_inputs is not None:
            x = jnp.concatenate((x, self.layer_inputs(tokens, x)), axis=-1)
        if self.config.handed_on:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, self.config.handed_on)))
        return constrain(x, "batch", "length", "activation_embed")

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        remat: bool = False,
        keep_attention: bool = False,
        exchange: Exchange = "auto",
        prefix: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Hidden states after the last norm, over a whole sequence.

        `positions` defaults to 0, 1, ...; tokens of different `segment_ids` do not see each other. `remat` keeps only
        each layer's input for the backward pass, with `keep_attention` also what its attention found, which the
        backward pass then does not compute again. `exchange`: between devices that share a sequence, see
        `attention.context.sequence`. `prefix`: see `forward`.
        """
        self = with_bounds(self)
        position = jnp.arange(tokens.shape[1]) if positions is None else positions
        positions = jnp.broadcast_to(position, tokens.shape).astype(jnp.uint32)
        context = SequenceContext(positions, segment_ids, tokens.shape[1], exchange=exchange)
        if prefix is not None:
            require_looking_ahead(self.config, segment_ids)
            context = dataclasses.replace(context, prefix=jnp.arange(tokens.shape[1]) < prefix[:, None])

        def apply(
            block: Block, x: Array, memory: ReadablePages | None = None
        ) -> tuple[Float[Array, "B T E"], ReadablePages | None]:
            return block.parallel(x, context, memory)

        if remat:
            kept = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT) if keep_attention else None
            apply = jax.checkpoint(apply, policy=kept)

        def period(x: Array, blocks: Sequence[Block]) -> tuple[Array, None]:
            for block in blocks:
                x, _ = apply(block, x)
            return x, None

        x = self.embed(tokens)
        if len(self.stack):
            x, _ = jax.lax.scan(period, x, tuple(self.stack))
        memory = None
        for block in self.layers:
            x, memory = apply(block, x, memory)
        return self.norm(x)

    def stream(
        self,
        tokens: Int[Array, "B C"],
        states: Sequence[State],
        caches: Sequence[Cache],
        context: ChunkContext,
        memorise: int | None = None,
        embedded: Float[Array, "B C W"] | None = None,
    ) -> tuple[Float[Array, "B C E"], tuple[State, ...]]:
        """Hidden states after the last norm for one chunk of a stream, and the layers' new states.

        A layer whose keys others read takes the chunk in when all of them have read its state.

        With `memorise`, a memory layer, that layer only encodes its input and those above it do nothing; the hidden
        states then mean nothing. `embedded`: what the first layer reads in the place of `embed(tokens)`.
        """
        self = with_bounds(self)
        x, memory = self.embed(tokens) if embedded is None else embedded, None
        new_states = list(states)
        lenders = {cache.layer for cache in caches if isinstance(cache, SlotsOf)}
        for i, (state, cache) in enumerate(zip(states, caches, strict=True)):
            if i == memorise:
                new_states[i] = self.layer(i).memorise(x, state, cache, context)[0]
                break
            if isinstance(cache, SlotsOf):
                x, *_ = self.layer(i).stream(x, states[cache.layer], caches[cache.layer].deferred(), context)
                continue
            shown = cache.deferred() if i in lenders else cache
            x, new_states[i], memory = self.layer(i).stream(x, state, shown, context, memory)
        valid = ordered_after(context.valid, x) if lenders else context.valid
        for i in lenders:
            if not isinstance(caches[i], Deferred):
                new_states[i] = take_in(caches[i], states[i], new_states[i], valid)
        return self.norm(x), tuple(new_states)

    def logits(self, hidden: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Next-token logits of hidden states, float32."""
        dtype = accumulator(hidden.dtype)
        if self.head is None:
            weight, equation = self.embedding, "bte,ve->btv"
        else:
            weight, equation = self.head, "bte,ev->btv"
        logits = product(equation, hidden, weight[...], dtype)
        if self.head_bias is not None:
            logits = logits + self.head_bias[...].astype(dtype)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * jnp.tanh(logits / self.config.logit_softcap)
        return constrain(logits, "batch", "length", "vocab")


def require_looking_ahead(config: ModelConfig, segment_ids: Any = None) -> None:
    """Raise a ValueError unless a model looks at a prefix before it reads it, and rows have one document each."""
    if not config.looks_ahead:
        raise ValueError("no layer of this model looks at a prefix ahead (PrefixLinearConfig): leave prefix out")
    if segment_ids is not None:
        raise ValueError("packed rows have several documents, and a prefix is a row's: leave segment_ids or prefix out")


@partial(jax.jit, static_argnames="remat")
def forward(
    model: Decoder,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    remat: bool = False,
    prefix: Int[Array, " B"] | None = None,
) -> Float[Array, "B T V"]:
    """Logits of the model as pretrained, over whole sequences, float32.

    Args:
      model: the model.
      tokens: int32 token ids.
      positions: position of each token; 0, 1, ... where None.
      segment_ids: tokens see only their own segment (packed sequences).
      remat: keep only each layer's input for a backward pass.
      prefix: tokens of each row that layers of prefix linear attention (`PrefixLinearConfig`) look at before they read
        the first: a prompt, each of whose tokens then sees all of it.

    Example:
      >>> sj.forward(model, prompt).shape  # [B, T, V]
      (1, 16, 259)
    """
    hidden = model.hidden(tokens, positions=positions, segment_ids=segment_ids, remat=remat, prefix=prefix)
    return model.logits(hidden)


@jax.tree_util.register_pytree_node_class
class FlatModel:
    """The arrays of a model, for programs that are called once a token.

    Every call of a compiled program walks through the trees of its arguments. Of modules that is work for Python: for
    SmolLM2-135M, whose 30 layers have 182 arrays, about a millisecond a call. Here it is done once.

    Args:
      model: what it is now; changes of its modules do not show here.

    Example:
      >>> flat = FlatModel(model)
      >>> jax.jit(lambda flat, tokens: flat.model.hidden(tokens))(flat, prompt).shape
      (1, 16, 16)
    """

    def __init__(self, model: Decoder):
        arrays, self._structure = jax.tree.flatten(model)
        self._arrays = tuple(arrays)

    @property
    def model(self) -> Decoder:
        """The model; inside of a program, of its tracers."""
        whole: Decoder = jax.tree.unflatten(self._structure, self._arrays)
        return whole

    def tree_flatten(self) -> tuple[tuple[Array, ...], Any]:
        return self._arrays, self._structure

    @classmethod
    def tree_unflatten(cls, structure: Any, arrays: tuple[Array, ...]) -> FlatModel:
        flat = object.__new__(cls)
        flat._arrays, flat._structure = arrays, structure
        return flat
