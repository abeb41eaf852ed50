"""A decoder, in words: a list of blocks between an embedding and an output head."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Any

from streamjax.field_checks import Count, Positive, Size, check_fields, from_plain, hashed_once, to_plain
from streamjax.models.config.attention import AttentionConfig
from streamjax.models.config.block import BlockConfig
from streamjax.models.config.hierarchical import HSAConfig
from streamjax.models.config.norm import NormConfig
from streamjax.models.config.recurrent import RecurrentConfig


@hashed_once
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model. Every field is static; two equal configs compile to the same program.

    Shapes: `vocab_size` tokens, `d_model` channels of the residual stream; the blocks have their own.

    blocks: the layers, from the input upwards. Equal ones, or a repeating period of them, can be stacked and scanned.
    norm: behind the last layer. embedding_norm: of what the first layer reads (RWKV); None: there is none.
    logit_scale: factor on the logits, before `logit_softcap`.
    max_position: the length the model was trained at; nothing stops there.
    sink_token: it was trained with a dedicated first token that serves as attention sink.

    Example:
      >>> attention = sj.AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=32)
      >>> block = sj.BlockConfig(mixer=attention, mlp=sj.DenseConfig(mlp_dim=512))
      >>> sj.ModelConfig(vocab_size=259, d_model=256, blocks=(block,) * 4).num_layers
      4
    """

    vocab_size: Size
    d_model: Size
    blocks: tuple[BlockConfig, ...]
    family: str = "llama"
    norm: NormConfig = NormConfig()
    hsa: HSAConfig | None = None
    tie_embeddings: bool = False
    embedding_scale: Positive = 1.0
    embedding_norm: NormConfig | None = None
    logit_scale: Positive = 1.0
    logit_softcap: Positive | None = None
    logit_bias: bool = False
    max_position: Size = 2048
    bos_token_id: Count | None = None
    eos_token_ids: tuple[Count, ...] = ()
    sink_token: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.blocks:
            raise ValueError("ModelConfig.blocks is empty: a model has at least one layer")
        if self.hsa is not None and max(self.hsa.layers + self.hsa.memory_layers) >= self.num_layers:
            raise ValueError(
                f"ModelConfig.hsa names layer {max(self.hsa.layers + self.hsa.memory_layers)} of {self.num_layers}"
            )
        memories = () if self.hsa is None else self.hsa.layers + self.hsa.memory_layers
        for i in memories:
            block = self.blocks[i]
            if block.beside is not None:
                raise ValueError(f"ModelConfig.hsa names layer {i}, which has a recurrent mixer beside its attention")
            if self.hsa is not None and block.mixer.recurrent and self.hsa.attention is None:
                raise ValueError(f"ModelConfig.hsa names layer {i}, which has no attention: give HSAConfig.attention")
            if self.hsa is not None and self.remembers(i) and block.mlp is None and self.hsa.mlp is None:
                raise ValueError(f"ModelConfig.hsa remembers layer {i}, which has no MLP: give HSAConfig.mlp")
        self._check_handed_on()
        self._check_bounds()
        for token in self.eos_token_ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"ModelConfig.eos_token_ids has {token!r}, which is outside the vocabulary of {self.vocab_size}"
                )

    def _check_handed_on(self) -> None:
        """Whether every layer that takes something finds it."""
        found = 0
        for i, block in enumerate(self.blocks):
            if block.layer_input != self.blocks[0].layer_input:
                raise ValueError(f"ModelConfig.blocks: layer {i} has another layer_input than layer 0: all are alike")
            if isinstance(block.mixer, AttentionConfig):
                self._check_keys_of(i, block.mixer)
                continue
            if block.received and block.received != found:
                made = f"layers below hand on {found}" if found else "no layer below hands any on"
                raise ValueError(f"ModelConfig.blocks: layer {i} takes {block.received} channels, and {made}")
            if block.handed_on and found not in (0, block.handed_on):
                raise ValueError(
                    f"ModelConfig.blocks: layer {i} hands on {block.handed_on} channels, and one below {found}"
                )
            found = block.handed_on or found
        if self.stream_width > self.d_model and self.hsa is not None:
            raise ValueError("ModelConfig.hsa is for models whose layers hand nothing else on")

    def _check_bounds(self) -> None:
        """Whether the layers whose least decays are learned have equal tables."""
        found = self.bounded_layers
        for i, block in enumerate(self.blocks):
            if block.beside is not None and block.beside.bounds_shape:
                raise ValueError(f"ModelConfig.blocks: layer {i} has learned bounds beside attention: give a number")
            if i in found and block.mixer.bounds_shape != self.bounds_shape[1:]:
                raise ValueError(
                    f"ModelConfig.blocks: layer {i} learns bounds of {block.mixer.bounds_shape} groups and channels, "
                    f"and layer {found[0]} of {self.bounds_shape[1:]}: all layers share one table"
                )

    def _check_keys_of(self, layer: int, mixer: AttentionConfig) -> None:
        """Whether a layer that reads another's keys finds such as it can read."""
        if mixer.keys_of is None:
            return
        source = self.blocks[mixer.keys_of].mixer if mixer.keys_of < layer else None
        if not isinstance(source, AttentionConfig) or not source.hands_on_keys:
            raise ValueError(
                f"ModelConfig.blocks: layer {layer} reads the keys of layer {mixer.keys_of}, which is no layer below "
                "it with hands_on_keys"
            )
        for name in ("num_kv_heads", "head_dim", "rope", "alibi_slopes", "window", "sinks", "chunk"):
            own, theirs = getattr(mixer, name), getattr(source, name)
            if own != theirs:
                raise ValueError(
                    f"ModelConfig.blocks: layer {layer} has {name} {own!r}, and layer {mixer.keys_of}, whose keys it "
                    f"reads, {theirs!r}"
                )

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @cached_property
    def handed_on(self) -> int:
        """Channels that layers hand on beside the residual stream; 0 in most models.

        What recurrent layers hand on is in one place; each layer whose keys others read has a place of its own.
        """
        return self._recurrent_channels + sum(mixer.handed_on for _, mixer in self._lenders)

    @property
    def _recurrent_channels(self) -> int:
        return max(0 if isinstance(block.mixer, AttentionConfig) else block.handed_on for block in self.blocks)

    @cached_property
    def _lenders(self) -> list[tuple[int, AttentionConfig]]:
        mixers = [(i, block.mixer) for i, block in enumerate(self.blocks)]
        return [(i, m) for i, m in mixers if isinstance(m, AttentionConfig) and m.hands_on_keys]

    @cached_property
    def bounded_layers(self) -> tuple[int, ...]:
        """The layers whose least decays are learned, from one table (`models/mixers/handed_on/learned_bounds.py`)."""
        return tuple(i for i, block in enumerate(self.blocks) if block.mixer.bounds_shape)

    @property
    def bounds_shape(self) -> tuple[int, ...]:
        """Of that table: layers, groups, channels of a group; empty where nothing of the kind is learned."""
        layers = self.bounded_layers
        return (len(layers), *self.blocks[layers[0]].mixer.bounds_shape) if layers else ()

    @property
    def layer_inputs(self) -> int:
        """Channels of a token that all layers' `layer_input` have together; 0 in most models."""
        found = self.blocks[0].layer_input
        return 0 if found is None else self.num_layers * found.channels

    def handed_at(self, layer: int) -> int:
        """Channels of `stream_width` in front of those that a layer hands on, or takes."""
        start, mixer = self.d_model + self.layer_inputs, self.blocks[layer].mixer
        if not isinstance(mixer, AttentionConfig) or not (mixer.handed_on or mixer.received):
            return start
        place = layer if mixer.keys_of is None else mixer.keys_of
        return start + self._recurrent_channels + sum(m.handed_on for i, m in self._lenders if i < place)

    @property
    def reads_layerwise(self) -> bool:
        """Whether a long stretch can be read one layer after the other: no layer reads what another one stores."""
        return self.hsa is None and not self._lenders

    @property
    def looks_ahead(self) -> bool:
        """Whether a layer reads a prefix before its first token (`PrefixLinearConfig`)."""
        mixers = (mixer for block in self.blocks for mixer in (block.mixer, block.beside))
        return any(isinstance(mixer, RecurrentConfig) and mixer.looks_ahead for mixer in mixers)

    @property
    def stream_width(self) -> int:
        """Channels of what goes from layer to layer: the residual stream, layers' inputs, and what is handed on."""
        return self.d_model + self.layer_inputs + self.handed_on

    def remembers(self, layer: int) -> bool:
        """Whether a layer's input becomes a chunk memory (`HSAConfig`)."""
        return self.hsa is not None and layer in self.hsa.memory_layers

    def reads(self, layer: int) -> bool:
        """Whether a layer attends to a chunk memory (`HSAConfig`)."""
        return self.hsa is not None and layer in self.hsa.layers

    def memory_block(self, layer: int) -> BlockConfig:
        """The heads, MLP and norms of what encodes and reads a chunk memory at a layer."""
        assert self.hsa is not None
        return self.hsa.of_layer(self.blocks[layer])

    @cached_property
    def period(self) -> int:
        """Smallest P such that layer i and layer i + P are alike for every i: the body of a scan over layers."""
        specs = [(block, self.remembers(i), self.reads(i), self.handed_at(i)) for i, block in enumerate(self.blocks)]
        return next(p for p in range(1, self.num_layers + 1) if all(s == specs[i % p] for i, s in enumerate(specs)))

    @property
    def repeats(self) -> int:
        """How often the period repeats, as far as layers can be stacked: a scan cannot hand on a chunk memory."""
        return 0 if self.hsa is not None else self.num_layers // self.period

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def parameter_count(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        ends = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2) + self.logit_bias * self.vocab_size
        layers = sum(block.parameter_count(self.d_model) for block in self.blocks)
        found, table = self.blocks[0].layer_input, 0
        if found is not None:
            table = (self.vocab_size + self.d_model) * self.layer_inputs + self.norm.parameter_count(found.channels)
        table += 0 if self.embedding_norm is None else self.embedding_norm.parameter_count(self.d_model)
        table += math.prod(self.bounds_shape) if self.bounds_shape else 0
        return layers + table + self._memory_parameters() + self.norm.parameter_count(self.d_model) + ends

    def _memory_parameters(self) -> int:
        if self.hsa is None:
            return 0
        d, count = self.d_model, 0
        for i in range(self.num_layers):
            if not (self.remembers(i) or self.reads(i)):
                continue
            block = self.memory_block(i)
            mixer, norm = block.attention, block.norm.parameter_count(self.d_model)
            heads, keys, width = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
            if self.remembers(i) and block.mlp is not None:
                layer = mixer.parameter_count(d) + block.mlp.parameter_count(d) + 2 * norm
                count += self.hsa.encoder_layers * layer + norm + 3 * d * keys * width + d + width
            if self.reads(i):
                count += norm + d * (heads + keys) * width + heads * width * d + width
        return count

    def to_json_dict(self) -> dict[str, Any]:
        """A dictionary of plain values, from which `from_json_dict` rebuilds the config.

        `blocks` has each different block once, `layers` the place in it of every layer's.
        """
        different = tuple(dict.fromkeys(self.blocks))
        layers = tuple(different.index(block) for block in self.blocks)
        return {**to_plain(self), "blocks": to_plain(different), "layers": layers}

    @classmethod
    def from_json_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild a config that went through JSON; what is no config is a ValueError of one line."""
        if "layers" not in values:
            raise ValueError("ModelConfig.layers is missing: which block each layer has")
        blocks, layers = values.get("blocks"), values["layers"]
        if not isinstance(blocks, list | tuple) or not isinstance(layers, list | tuple):
            raise ValueError("ModelConfig.blocks and layers must be lists")
        if not all(type(i) is int and 0 <= i < len(blocks) for i in layers):
            raise ValueError(f"ModelConfig.layers must have places in the {len(blocks)} blocks")
        rest = {name: value for name, value in values.items() if name not in ("blocks", "layers")}
        different = from_plain(cls, {**rest, "hsa": None, "blocks": blocks})
        hsa = from_plain(HSAConfig, rest["hsa"]) if rest.get("hsa") is not None else None
        return different.replace(hsa=hsa, blocks=tuple(different.blocks[i] for i in layers))
