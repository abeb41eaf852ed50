"""What one gradient step needs of memory, by a formula: `estimate`.

A step has phases: the loss, the layers backwards, the embedding. The formula adds up what is alive at once in each and
takes the phase that needs most; `Memory.parts` has its terms. What lies between operations inside a layer is up to the
compiler, so `layer_bytes.py` is fitted to compiled programs, as are the copies of logits and of weights. It describes
stacked layers, of which a loop holds one at a time; for others a CPU's compiler takes up to 2.2 times as much.
`benchmarks/backprop/memory_model.py` holds the formula against the compilers' own figures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from pallas_kernels.partial import accumulator
from streamjax.attention.block_cutting import even_size
from streamjax.models.config import (
    AttentionConfig,
    AttentionMixerConfig,
    BlockConfig,
    DenseAndExpertsConfig,
    DenseConfig,
    ExpertsConfig,
    LatentAttentionConfig,
    ModelConfig,
    UniformConfig,
    expanded,
)
from streamjax.models.config.recurrent import RecurrentConfig
from streamjax.training.backprop.embedding_and_head import LOGITS_PER_CHUNK
from streamjax.training.backprop.planning.layer_bytes import found_numbers, saved_bytes, state_bytes, working_bytes
from streamjax.training.backprop.sequence_chunks import key_block
from streamjax.training.backprop.storage.state_store import StateStore, Store, make_store

DEFAULT_CHUNK = 2048  # tokens
KEY_BLOCK = 512  # slots: buffers of keys end in whole blocks of attention, which have no more keys than this
RING_ARRAYS = 6  # as wide as a layer's queries, in the accumulator's dtype; fitted to compiled programs
TENSOR_ARRAYS = 10  # as wide as the model, that each device along tensor holds; fitted to compiled programs
TENSOR_COPIES = 2  # of a whole sequence's states, that the layer order holds along tensor
LOGITS_COPIES = 2  # float32 arrays of the size of the logits that are there at once
Parts = dict[str, int]
Order = tuple[Parts, list[Parts], int]  # what is there in all phases, in each phase; bytes of the host's memory


class Memory(NamedTuple):
    """Bytes that a step needs on one device and of the host's memory; `parts` are those on the device, by purpose."""

    device_bytes: int
    host_bytes: int
    parts: Mapping[str, int]


def estimate(
    config: ModelConfig | UniformConfig,
    *,
    batch_size: int,
    length: int,
    method: str = "full",
    chunk_size: int | None = None,
    segment: int = 1,
    offload: Literal["host"] | None = None,
    offload_fraction: float = 1.0,
    keep_attention: bool = False,
    kv_grad_dtype: Any = None,
    grad_dtype: Any = None,
    param_dtype: Any = jnp.bfloat16,
    dtype: Any = jnp.bfloat16,
    logits_chunk: int | None = None,
    stacked: bool = True,
    platform: str = "tpu",
    shards: int = 1,
    tensor: int = 1,
    context: int = 1,
    trained: float = 1.0,
) -> Memory:
    """Memory of one `loss_and_grad`: parameters, their gradients, and everything between.

    Args:
      config: the model.
      batch_size, length: rows and tokens of a row on one device.
      method, chunk_size, segment, offload, offload_fraction, keep_attention, kv_grad_dtype, grad_dtype, logits_chunk:
        as they are given to `loss_and_grad`.
      param_dtype, dtype: of parameters, and of activations.
      stacked: whether repeating layers are stacked (`scan_layers`).
      platform: "cpu" has a compiler that fuses less; all others count as "tpu".
      shards: devices over which parameters and gradients are split; activations are not.
      tensor: devices of these along the mesh axis `tensor`, which split heads, channels of MLPs and the vocabulary too,
        evenly.
      context: devices that share each sequence, of which `length` is one device's part.
      trained: share of the parameters that get a gradient.

    Raises:
      ValueError: `method` is none of "full", "remat", "layer" and "chunk".
    """
    config = expanded(config)
    terms = _Terms(
        config=config,
        batch=batch_size,
        length=length,
        chunk=min(chunk_size or DEFAULT_CHUNK, length),
        segment=segment,
        away=offload_fraction if offload else 0.0,
        kept=keep_attention,
        stacked=stacked,
        fused=platform != "cpu",
        shards=shards,
        tensor=tensor,
        context=context,
        trained=trained,
        item=jnp.dtype(dtype).itemsize,
        wide=accumulator(dtype).itemsize,
        param=jnp.dtype(param_dtype).itemsize,
        grad=jnp.dtype(grad_dtype or accumulator(param_dtype)).itemsize,
        kv_grad=jnp.dtype(kv_grad_dtype or accumulator(dtype)).itemsize,
        stretch=even_size(length, logits_chunk or LOGITS_PER_CHUNK // (batch_size * config.vocab_size)),
    )
    orders = {"full": terms.full, "remat": terms.remat, "layer": terms.layer, "chunk": terms.chunks}
    if method not in orders:
        raise ValueError(f"no estimate for method {method!r}; use one of {', '.join(orders)}")
    always, phases, host_bytes = orders[method]()
    parts = always | max(phases, key=lambda phase: sum(phase.values()))
    return Memory(sum(parts.values()), host_bytes, {name: size for name, size in parts.items() if size})


def split_evenly(config: ModelConfig | UniformConfig, tensor: int) -> bool:
    """Whether so many devices along `tensor` have equal parts of each layer, and none the same as another."""
    sizes = set()
    for block in expanded(config).blocks:
        mixer, mlp = block.mixer, block.mlp
        if isinstance(mixer, AttentionConfig):
            sizes.add(mixer.num_kv_heads)
        else:
            sizes.add(mixer.num_heads if isinstance(mixer, LatentAttentionConfig) else getattr(mixer, "num_heads", 1))
        parts = (mlp.dense, mlp.experts) if isinstance(mlp, DenseAndExpertsConfig) else (mlp,)
        sizes |= {part.mlp_dim for part in parts if isinstance(part, DenseConfig | ExpertsConfig)}
    return all(size % tensor == 0 for size in sizes)


@dataclasses.dataclass(frozen=True)
class _Terms:
    """The terms of the formula.

    item, wide, param, grad, kv_grad: bytes of an activation, of an accumulator's number, of a parameter, of a
    parameter's and of a key's gradient while it is summed. away: share of the layers' inputs in the host's memory.
    kept: whether what attention found is kept too.
    stretch: tokens of a row whose logits exist at once. fused: whether the compiler makes one pass of many operations.
    """

    config: ModelConfig
    batch: int
    length: int
    chunk: int
    segment: int
    away: float
    kept: bool
    stacked: bool
    fused: bool
    shards: int
    tensor: int
    context: int
    trained: float
    item: int
    wide: int
    param: int
    grad: int
    kv_grad: int
    stretch: int

    @property
    def kinds(self) -> tuple[BlockConfig, ...]:
        """The different layers."""
        return tuple(dict.fromkeys(self.config.blocks))

    @property
    def count(self) -> int:
        return math.ceil(self.length / self.chunk)

    @property
    def padded(self) -> int:
        return self.count * self.chunk

    @property
    def end_parameters(self) -> int:
        """Parameters of the embedding, or of the head, as they are there along tensor."""
        return self.config.vocab_size * self.config.d_model // self.tensor

    @property
    def layer_parameters(self) -> int:
        """Parameters of the largest layer, as they are there along tensor."""
        ends = self.config.vocab_size * self.config.d_model * (1 if self.config.tie_embeddings else 2)
        mean = (self.config.parameter_count - ends) // self.config.num_layers
        return max(mean, *(block.parameter_count(self.config.d_model) for block in self.kinds)) // self.tensor

    def states(self, tokens: int) -> int:
        return self.batch * tokens * self.config.stream_width * self.item

    def key_values(self, slots: int, size: int) -> int:
        """The widest layer's keys and values in `slots` slots a row, numbers of `size` bytes."""
        return max(self.layer_key_values(block, slots, size) for block in self.kinds)

    def layer_key_values(self, block: BlockConfig, slots: int, size: int) -> int:
        """The same of one layer; of a recurrent one its states at the borders of chunks, of one with both all."""
        mixer = block.mixer
        if isinstance(mixer, RecurrentConfig):
            return self.layer_states(mixer, self.count + 1)
        return self.layer_states(block.beside, self.count + 1) + self.layer_keys(mixer, slots, size)

    def layer_keys(self, mixer: AttentionMixerConfig, slots: int, size: int) -> int:
        """Keys and values of one layer."""
        return 2 * self.batch * slots * mixer.num_kv_heads * mixer.head_dim * size // self.tensor

    def layer_states(self, mixer: RecurrentConfig | None, places: int) -> int:
        """So many states of one recurrent mixer."""
        return 0 if mixer is None else places * self.batch * state_bytes(mixer, self.item, self.wide)

    def stored(self, block: BlockConfig, store: Store, local: bool, size: int) -> int:
        """What the chunk order keeps of one layer, or (`local`) of its gradients."""
        if isinstance(store, StateStore):
            return self.layer_states(store.mixer, store.places(local))
        beside = self.layer_states(block.beside, 1 if local else self.count + 1)
        return beside + self.layer_keys(block.attention, store.local if local else store.slots, size)

    def whole_slots(self) -> int:
        block = min(key_block(), self.padded)
        return math.ceil(self.padded / block) * block

    def always(self) -> Parts:
        """The arguments of a step and its result."""
        size = self.config.parameter_count * self.param // self.shards
        return {"weights": size, "gradients": int(self.trained * size), "batch": 12 * self.batch * self.length}

    def gathered(self, ends: float, layers: int = 1) -> Parts:
        """Of parameters that are split, so many ends and layers that are whole at once."""
        size = self.param * (ends * self.end_parameters + layers * self.layer_parameters)
        return {"gathered weights": int(size) if self.shards > self.tensor else 0}

    def gathered_ends(self) -> Parts:
        """The ends, which the chunked orders gather for all of a step, and the layer at hand."""
        return self.gathered(1 if self.config.tie_embeddings else 2)

    def copied_weights(self) -> Parts:
        """Of stacked layers under two loops the TPU's compiler holds the fused projection in two more layouts, with the
        members of a group and their channels padded to its tiles of 8 x 128."""
        nested, tiles = self.stacked and self.fused, 0
        for mixer in (block.mixer for block in self.config.blocks):
            if isinstance(mixer, RecurrentConfig):
                continue
            tile = math.ceil(mixer.members / 8) * 8 * math.ceil(mixer.head_dim / 128) * 128
            tiles += mixer.num_kv_heads * tile
        size = 2 * self.config.d_model * tiles * self.param
        return {"copied weights": size // self.shards if nested else 0}

    def sums(self, name: str, parameters: int, size: int) -> Parts:
        """Gradients of parameters that are summed over chunks or stretches, numbers of `size` bytes."""
        return {f"{name}'s sums": int(self.trained * parameters * size)}

    def part(self, name: str, parameters: int) -> Parts:
        """The same from one chunk or stretch alone."""
        return {f"{name}'s part": int(self.trained * parameters * self.param)}

    def work(self, tokens: int) -> Parts:
        """Inside one layer, for `tokens` tokens of each row."""
        sizes = self.config.d_model, self.batch * tokens, self.item, self.wide
        states = 2 * self.states(tokens)  # as wide as the model: each device along tensor has them
        working = states + max(working_bytes(block, *sizes) - states for block in self.kinds) // self.tensor
        if self.tensor > 1:
            working += TENSOR_ARRAYS * self.states(tokens)
        saved = 0 if self.fused else max(self.saved(block, tokens) for block in self.kinds)
        return {"layer's work": working + saved}

    def saved(self, block: BlockConfig, tokens: int) -> int:
        """What `jax.grad` saves of a layer for `tokens` tokens of each row."""
        states = 2 * self.states(tokens) + 3 * self.wide * self.batch * tokens * self.config.d_model * block.norm_count
        sizes = self.config.d_model, self.batch * tokens, self.item, self.wide
        return states + (saved_bytes(block, *sizes) - states) // self.tensor

    def ring(self) -> Parts:
        """What a layer that attends to all tokens of a shared sequence holds beside its work: its queries, outputs
        and gradients in zigzag, and keys and their gradients on the way."""
        mixers = [
            block.mixer for block in self.kinds if isinstance(block.mixer, AttentionConfig | LatentAttentionConfig)
        ]
        full = [mixer.num_heads * mixer.head_dim for mixer in mixers if getattr(mixer, "window", None) is None]
        if self.context == 1 or not full:
            return {}
        return {"ring's work": RING_ARRAYS * self.batch * self.length * max(full) * self.wide // self.tensor}

    def logits(self) -> Parts:
        """Of one stretch, with the gradient that the head gets from it."""
        size = LOGITS_COPIES * self.batch * self.stretch * self.config.vocab_size * self.wide // self.tensor
        return {"logits": size, **self.part("head", self.end_parameters)}

    def full(self) -> Order:
        return self.by_jax({"activations": sum(self.saved(block, self.length) for block in self.config.blocks)})

    def remat(self) -> Order:
        inputs = {"layer inputs": self.config.num_layers * self.states(self.length)}
        return self.by_jax(inputs | {"attention found": self.found(self.length)})

    def found(self, tokens: int) -> int:
        """What attention finds in all layers for so many tokens of each row, where it is kept."""
        width = sum(map(found_numbers, self.config.blocks))
        return self.kept * self.batch * tokens * width * self.wide // self.tensor

    def by_jax(self, kept: Parts) -> Order:
        """`jax.grad` of the whole sequence: what it keeps, and a pass over one layer of all tokens."""
        head = self.sums("head", self.end_parameters, self.param)
        output = {"hidden states": 2 * self.states(self.length), **head, **self.logits(), **self.gathered(1, 0)}
        layers = {
            **head,
            **self.gathered(0),
            **self.work(self.length),
            **self.ring(),
            "cotangent": self.states(self.length),
            "keys' gradients": self.key_values(self.length, self.wide),
            **self.part("layer", self.layer_parameters),
        }
        return {**self.always(), **kept}, [output, layers], 0

    def kept_inputs(self) -> tuple[int, int, int]:
        """Inputs of layers that the layer order keeps on the device, keeps in the host's memory, and has computed again
        of the segment at hand; how many, of all tokens each."""
        length = self.config.period if self.stacked else 1
        here = away = again = 0
        groups = (self.config.num_layers // length, length, True), (self.config.num_layers % length, 1, False)
        for rows, period, first in groups:
            if rows:
                run = max(1, self.segment // period)  # rows of a segment
                slots = math.ceil(rows / run) + (rows * (period - 1) if self.segment == 1 else 0)
                away += slots
                here += slots - (first and not self.away)  # the embedding is looked up again
                if self.segment > 1:
                    again = max(again, run * period - (0 if self.away else 1))
        return here, away, again

    def layer(self) -> Order:
        here, away, again = self.kept_inputs()
        moved = round(self.away * self.count) * self.chunk
        kept = {
            "layer inputs": here * self.states(self.padded - moved),
            "attention found": self.found(self.padded - moved),
        }
        head = self.sums("head", self.end_parameters, self.grad)
        layers = {
            **kept,
            **head,
            "inputs computed again": again * self.states(self.padded),
            **self.visible(),
            **self.sums("layer", self.layer_parameters, self.grad),
            **self.part("layer", self.layer_parameters),
            **self.work(self.chunk),
            "fetched chunks": 2 * self.states(self.chunk) if moved else 0,
        }
        ends = self.sums("embedding", self.end_parameters, self.grad) | self.part("embedding", self.end_parameters)
        copied = self.copied_weights() if self.segment > 1 else {}
        states = self.states(self.padded)
        both = {**self.always(), **self.gathered_ends(), **copied, "cotangent": states}
        both["tensor's copies"] = TENSOR_COPIES * states if self.tensor > 1 else 0
        host = away * self.states(moved) + self.found(moved)
        return both, [{**kept, **head, **self.logits()}, layers, {**head, **ends}], host

    def visible(self) -> Parts:
        """What chunks of one layer need of each other."""
        if self.context == 1:
            slots = self.whole_slots()
            return {
                "keys and values": self.key_values(slots, self.item),
                "keys' gradients": self.key_values(slots, self.kv_grad),
            }
        mixers = [dataclasses.replace(block, mlp=None) for block in self.kinds]  # over a stretch at once
        sizes = self.config.d_model, self.batch * self.length, self.item, self.wide
        work = max(working_bytes(mixer, *sizes) for mixer in mixers) // self.tensor
        return {"ring's work": max(work, *self.ring().values(), 0)}

    def stages(self) -> Order:
        """The chunk order with the layers dealt out to the devices along `context`."""
        whole = self.length * self.context
        chunk = min(self.chunk, self.length)
        stores = [(block, make_store(block.mixer, chunk, math.ceil(whole / chunk))) for block in self.config.blocks]
        layers = self.config.num_layers * self.layer_parameters // self.context
        always = self.always()
        gradients = {"gradients": always.pop("gradients")}
        ticks = {
            **self.gathered_ends(),
            "stage's weights": layers * self.param if self.shards > self.tensor else 0,
            "keys and values": sum(self.stored(*pair, False, self.item) for pair in stores) // self.context,
            "keys' gradients": sum(self.stored(*pair, True, self.kv_grad) for pair in stores) // self.context,
            "chunk's inputs": self.config.num_layers * self.states(chunk) // self.context,
            "stage's inputs": self.states(whole),
            "hidden states": 2 * self.states(self.length),
            **self.sums("all", layers + self.end_parameters, self.grad),
            **self.part("layer", self.layer_parameters),
            **self.work(chunk),
        }
        end = {**gradients, **self.sums("all", layers + 2 * self.end_parameters, self.grad)}
        return always, [ticks, end], 0

    def chunks(self) -> Order:
        if self.context > 1:
            return self.stages()
        stores = [(block, make_store(block.mixer, self.chunk, self.count)) for block in self.config.blocks]
        apart = self.grad != self.param or self.shards > 1  # else the sums are the result
        sums = self.sums("all", self.config.parameter_count // self.tensor, self.grad)
        both = {
            **self.always(),
            **self.gathered_ends(),
            **(sums if apart else {}),
            **self.copied_weights(),
            "keys and values": sum(self.stored(*pair, False, self.item) for pair in stores),
            "keys' gradients": sum(self.stored(*pair, True, self.kv_grad) for pair in stores),
            "chunk's inputs": self.config.num_layers * self.states(self.chunk),
        }
        layers = {**self.part("layer", self.layer_parameters), **self.work(self.chunk)}
        return both, [self.logits(), layers, self.part("embedding", self.end_parameters)], 0
