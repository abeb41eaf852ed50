"""RWKV-7 (2503.14456) as flash-linear-attention has it: a state a head that generalises the delta rule, no attention.

A layer of a file is two blocks here, time mixing and channel mixing, since both keep something of a stream. Layers
above the first mix its values into their own. Hybrids with attention, and values wider than the model, are refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from streamjax.models.config import BlockConfig, ChannelMixConfig, ModelConfig, NormConfig, RWKV7Config
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Source, Table

_LAYER = "model.layers.{layer}"
# Kernels, how a loss is computed, and heads, of which head_dim says as much.
_UNUSED = """
    attn_mode fuse_cross_entropy fuse_linear_cross_entropy fuse_norm num_heads use_l2warp
"""
_MIXES = "rkvwag"  # what queries, keys, values, decays, learning rates and gates are made of, by the names of a file
_OLDER = "rwkvag"  # their order where they are one tensor
_RANKS = {"decay": 64, "a": 64, "gate": 128, "v": 16}
_FACTORS = {"decay": 2.5, "a": 2.5, "gate": 5.0, "v": 1.7}


def _read(fields: Fields) -> ModelConfig:
    fields.seen.update(_UNUSED.split())
    fields.only("hidden_act", ("sqrelu",), "sqrelu")
    fields.only("attn", (None,))
    d_model, layers = fields.integer("hidden_size", 2048), fields.integer("num_hidden_layers", 24)
    width = fields.optional_integer("head_dim", 64) or d_model // fields.integer("num_heads")
    if d_model % width:
        raise ValueError(f"hidden_size {d_model} is no multiple of head_dim {width}")
    values = fields.get("value_dim", (int, list), None)
    if values is not None and set(values if isinstance(values, list) else [values]) != {d_model}:
        raise ValueError(f"field 'value_dim' is {values!r:.60}; streamjax has values of hidden_size, {d_model}")
    ratio = fields.get("hidden_ratio", (int, float), 4) or 4
    hidden = fields.optional_integer("intermediate_size") or 32 * math.ceil(int(d_model * ratio) / 32)
    heads, eps = d_model // width, fields.positive("norm_eps", 1e-5)
    norm = NormConfig("layer", eps, bias=fields.flag("norm_bias", True))
    ranks = {name: _read_rank(fields, name, d_model, width) for name in _RANKS}
    first = RWKV7Config(
        heads,
        heads,
        head_dim=width,
        rank=ranks["decay"],
        values="hands_on",
        rate_rank=ranks["a"],
        gate_rank=ranks["gate"],
        value_rank=ranks["v"],
        norm_eps=width * eps,
    )
    parts = math.gcd(heads, hidden)
    mix = ChannelMixConfig(parts, parts, width=d_model // parts, channels=hidden // parts)
    mixers = [first if layer == 0 else dataclasses.replace(first, values="takes") for layer in range(layers)]
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 32000),
        d_model=d_model,
        blocks=tuple(BlockConfig(mixer, None, norm) for pair in mixers for mixer in (pair, mix)),
        family="rwkv7",
        norm=norm,
        embedding_norm=norm if fields.flag("norm_first", True) else None,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=fields.integer("max_position_embeddings", 2048),
    )


def _read_rank(fields: Fields, name: str, d_model: int, width: int) -> int:
    """Channels of a pair of low rank; where the field is null they follow from the model's width."""
    field = f"{name}_low_rank_dim"
    rank = fields.optional_integer(field, _RANKS[name])
    if rank is not None:
        return rank
    factor = _FACTORS[name] * (1.0 if name == "gate" else width / 64)
    return max(32, round(factor * d_model**0.5 / 32) * 32)


def _write(config: ModelConfig) -> dict[str, Any]:
    mixers = [block.mixer for block in config.blocks]
    time, channels = mixers[0], mixers[-1]
    if not isinstance(time, RWKV7Config) or not isinstance(channels, ChannelMixConfig):
        raise ValueError("its layers are not RWKV-7's")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers // 2,
        "head_dim": time.head_dim,
        "num_heads": time.num_heads,
        "decay_low_rank_dim": time.rank,
        "a_low_rank_dim": time.rate_rank or time.rank,
        "gate_low_rank_dim": time.gate_rank or time.rank,
        "v_low_rank_dim": time.value_rank or time.rank,
        "value_dim": [config.d_model] * (config.num_layers // 2),
        "hidden_act": "sqrelu",
        "hidden_ratio": channels.projected / config.d_model,
        "intermediate_size": channels.projected,
        "norm_first": config.embedding_norm is not None,
        "norm_bias": config.norm.bias,
        "norm_eps": config.norm.eps,
        "attn": None,
        "attn_mode": "chunk",
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
    }


def _numbers(config: ModelConfig) -> Sequence[Mapping[str, int]]:
    """Which layer of the file a block is read from."""
    return [{"layer": block // 2} for block in range(config.num_layers)]


def _tensors(block: BlockConfig) -> Table:
    ends = {
        **tensor_tables.embedding_and_head("model.embeddings", "model.norm"),
        **tensor_tables.norm("embedding_norm", "model.layers.0.pre_norm"),
    }
    if isinstance(block.mixer, RWKV7Config):
        return {**ends, **tensor_tables.norm("layers.mixer_norm", f"{_LAYER}.attn_norm"), **_time(block.mixer)}
    return {
        **ends,
        **tensor_tables.norm("layers.mixer_norm", f"{_LAYER}.ffn_norm"),
        "layers.mixer.shift": (Source(f"{_LAYER}.ffn.x_k", "e -> e"),),
        "layers.mixer.inside": (Source(f"{_LAYER}.ffn.key.weight", "(k f) e -> e k f"),),
        "layers.mixer.out": (Source(f"{_LAYER}.ffn.value.weight", "e (k g f) -> k g f e"),),
    }


def _time(mixer: RWKV7Config) -> Table:
    """Time mixing: a pair of low rank each for decays, learning rates, gates and, above the first layer, values."""
    prefix, width, down, up, start = f"{_LAYER}.attn", mixer.head_dim, [], [], 0
    for name, rank in zip("wagv", mixer.ranks, strict=False):
        part = (start, start + rank)
        down.append(Source(f"{prefix}.{name}_lora.lora.0.weight", "g e -> e g", part))
        up.append(Source(f"{prefix}.{name}_lora.lora.2.weight", "(h d) g -> g h d", part))
        start += rank
    biases = ["w", "a", "v"][: len(mixer.ranks) - 1]
    into, of_head = "(k g) e -> e k g", "(g h d) -> g h d"
    return {
        "layers.mixer.mix": tuple(
            Source(f"{prefix}.x_{name}", "1 1 (g e) -> g e", (i, i + 1)) for i, name in enumerate(_MIXES)
        ),
        "layers.mixer.inside": tuple(
            Source(f"{prefix}.{name}_proj.weight", into, (i * width, (i + 1) * width)) for i, name in enumerate("rkv")
        ),
        "layers.mixer.down": tuple(down),
        "layers.mixer.up": tuple(up),
        "layers.mixer.bias": tuple(
            Source(f"{prefix}.{name}_lora.lora.2.bias", of_head, (i, i + 1)) for i, name in enumerate(biases)
        ),
        "layers.mixer.keys": (
            *(Source(f"{prefix}.k_{name}", of_head, (i, i + 1)) for i, name in enumerate("ka")),
            Source(f"{prefix}.r_k", "(g h) d -> g h d", (2, 3)),
        ),
        "layers.mixer.norm": tuple(
            Source(f"{prefix}.g_norm.{leaf}", of_head, (i, i + 1)) for i, leaf in enumerate(("weight", "bias"))
        ),
        "layers.mixer.out": (Source(f"{prefix}.o_proj.weight", "e (k g d) -> k g d e"),),
    }


_PACKED = {  # of the first version of the layout: all six in one tensor
    "layers.mixer.mix": tuple(
        Source(f"{_LAYER}.attn.x_x", "g e -> g e", (i, i + 1), (place, place + 1))
        for i, place in enumerate(_OLDER.index(name) for name in _MIXES)
    )
}
RWKV7 = Family("rwkv7", ("RWKV7ForCausalLM",), ("rwkv7",), _read, _write, _tensors, packed=_PACKED, numbers=_numbers)
