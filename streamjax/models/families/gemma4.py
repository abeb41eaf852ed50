"""Gemma 4 (Google, 2026; E2B, E4B, 12B, 26B-A4B and 31B): wide global heads, experts beside an MLP, shared keys.

Local layers have a window; global ones have wider heads of their own number, a quarter of whose channels rotate, and on
request one projection for keys and values. Values are normed too, each layer's output has a factor, and with
`enable_moe_block` a mixture of experts stands beside the MLP. A multimodal checkpoint loads as its language model: the
tensors of towers and embedders are left alone. In E2B and E4B the upper layers read the keys and values of the last
layer of their kind below them, with an MLP twice as wide on request, and every layer has embeddings of its own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseAndExpertsConfig,
    DenseConfig,
    ExpertsConfig,
    LayerInputConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
)
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields
from streamjax.models.families.family import Family, Source, Table
from streamjax.models.families.llama import read_shapes
from streamjax.models.families.rope_fields import parse_rope, rotary_fraction, write_scaling
from streamjax.models.families.window_fields import read_layer_types

_LAYER = tensor_tables.BLOCK
_OTHERS = (
    "vision_config audio_config boi_token_id eoi_token_id image_token_id video_token_id boa_token_id eoa_token_index "
    "eoa_token_id audio_token_id vision_soft_tokens_per_image"
)
_ROPES: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default"},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
}
_SIZES = {
    **{"vocab_size": 262_144, "hidden_size": 2304, "num_attention_heads": 8, "num_hidden_layers": 30},
    "intermediate_size": 9216,
}


def _read(fields: Fields) -> ModelConfig:
    text = fields
    if "text_config" in fields.values:
        text = fields.section("text_config")
        fields.seen.update(_OTHERS.split())
    text.defaults = _SIZES
    unified = str(text.values.get("model_type")).startswith("gemma4_unified")  # 12B, whose silence means other sizes
    shapes = read_shapes(text, head_dim=256, kv_heads=4, tie=True, activation="hidden_activation")
    layers, eps = shapes["num_layers"], shapes["norm_eps"]
    window = text.get("sliding_window", int, 1024 if unified else 512)
    windows = read_layer_types(text, layers, window, [(i + 1) % 6 != 0 for i in range(layers)]) or (None,) * layers
    windows = (*windows[:-1], None)  # the last layer is global, whatever is said of it
    text.only("use_bidirectional_attention", (None, "vision"))  # among the tokens of an image
    layer_input = _read_layer_input(text, shapes, 0 if unified else 256)
    sources = _read_sources(text, windows)
    heads, max_position = (
        _read_heads(text, windows, shapes),
        text.integer("max_position_embeddings", 262_144 if unified else 131_072),
    )
    ropes = text.get("rope_parameters", dict, None) or _ROPES
    ropes = {kind: values for kind, values in ropes.items() if kind not in ("rope_theta", "rope_type")}
    if not set(ropes) <= set(_ROPES) or not all(isinstance(ropes.get(kind) or {}, dict) for kind in _ROPES):
        raise ValueError(f"rope_parameters must have {' and '.join(_ROPES)}, and an object for each")
    bias, same = text.flag("attention_bias", False), text.flag("attention_k_eq_v", False)
    norm, mlp = NormConfig(eps=eps), _read_mlp(text, shapes)
    wide = _twice_as_wide(mlp) if text.flag("use_double_wide_mlp", False) else mlp

    def block(layer: int, window: int | None, width: int, kv_heads: int) -> BlockConfig:
        source = sources.get(layer)
        kind = "full_attention" if window is None else "sliding_attention"
        theta = 1_000_000.0 if window is None else 10_000.0
        rope = parse_rope(
            ropes.get(kind) or {}, head_dim=width, max_position=max_position, theta=theta, proportional=True
        )
        mixer = AttentionConfig(
            num_heads=shapes["num_heads"],
            num_kv_heads=kv_heads,
            head_dim=width,
            rope=rope,
            window=window,
            scale=1.0,
            qk_norm=norm,
            value_norm=None if layer in sources else NormConfig(eps=eps, weight=False),
            value_is_key=same and window is None and layer not in sources,
            qkv_bias=bias,
            out_bias=bias,
            hands_on_keys=layer in sources.values(),
            keys_of=source,
        )
        return BlockConfig(
            mixer=mixer,
            mlp=mlp if source is None else wide,
            norm=norm,
            post_norms=True,
            layer_scale=True,
            layer_input=layer_input,
        )

    return ModelConfig(
        vocab_size=shapes["vocab_size"],
        d_model=shapes["d_model"],
        blocks=tuple(block(i, window, *own) for i, (window, own) in enumerate(zip(windows, heads, strict=True))),
        family="gemma4",
        norm=norm,
        tie_embeddings=fields.flag("tie_word_embeddings", shapes["tie_embeddings"]),
        embedding_scale=math.sqrt(shapes["d_model"]),
        logit_softcap=text.optional_positive("final_logit_softcapping"),
        max_position=max_position,
    )


def _read_layer_input(fields: Fields, shapes: dict[str, Any], width: int) -> LayerInputConfig | None:
    """What every layer is told of a token by an embedding of its own; `width` is a default."""
    width = fields.integer("hidden_size_per_layer_input", width, least=0)
    rows, vocab = fields.integer("vocab_size_per_layer_input", 262_144), shapes["vocab_size"]
    if width and rows != vocab:
        raise ValueError(f"field 'vocab_size_per_layer_input' is {rows}: it must be vocab_size, {vocab}")
    return LayerInputConfig(width, shapes["activation"]) if width else None


def _read_sources(fields: Fields, windows: tuple[int | None, ...]) -> dict[int, int]:
    """For each of the upper layers that have no keys, the layer whose keys it reads: the last of its kind below."""
    count = fields.integer("num_kv_shared_layers", 0, least=0)
    first, found = len(windows) - count, {}
    for layer in range(max(first, 0), len(windows)):
        alike = [i for i in range(first) if (windows[i] is None) == (windows[layer] is None)]
        if not alike:
            kind = "full" if windows[layer] is None else "sliding"
            raise ValueError(
                f"field 'num_kv_shared_layers' is {count}: layer {layer} has {kind} attention, and no layer of this "
                "kind below has keys of its own"
            )
        found[layer] = alike[-1]
    return found


def _twice_as_wide(mlp: MLPConfig) -> MLPConfig:
    """The MLP of layers that read the keys of others, where those have a wider one."""
    if isinstance(mlp, DenseAndExpertsConfig):
        return dataclasses.replace(mlp, dense=dataclasses.replace(mlp.dense, mlp_dim=2 * mlp.dense.mlp_dim))
    assert isinstance(mlp, DenseConfig)
    return dataclasses.replace(mlp, mlp_dim=2 * mlp.mlp_dim)


def _read_heads(fields: Fields, windows: tuple[int | None, ...], shapes: dict[str, Any]) -> list[tuple[int, int]]:
    """Each layer's head width and number of key/value heads."""
    local = shapes["head_dim"], shapes["num_kv_heads"]
    count = fields.optional_integer("num_global_key_value_heads")
    if count is None or not fields.flag("attention_k_eq_v", False):
        count = local[1]
    far = fields.integer("global_head_dim", 512), count
    own = fields.get("per_layer_config", dict, None)  # as transformers 5.24 writes the two fields
    if own is None:
        return [far if window is None else local for window in windows]
    found, places = [], {str(place).lstrip("0") or "0": values for place, values in own.items()}  # "05" is layer 5
    unknown = sorted(set(places) - {str(layer) for layer in range(len(windows))})
    if unknown:
        raise ValueError(f"field 'per_layer_config' has {unknown[0][:60]!r}, which is none of {len(windows)} layers")
    for layer in range(len(windows)):
        values = places.get(str(layer)) or {}
        if not isinstance(values, dict) or not set(values) <= {"head_dim", "num_key_value_heads"}:
            shown = str(values)[:60]
            raise ValueError(f"field 'per_layer_config' has {shown!r} for layer {layer}; expected sizes of heads")
        sizes = Fields(values)
        found.append((sizes.integer("head_dim", local[0]), sizes.integer("num_key_value_heads", local[1])))
    return found


def _read_mlp(fields: Fields, shapes: dict[str, Any]) -> MLPConfig:
    """The MLP of every layer, with experts beside it if there are any."""
    dense = DenseConfig(shapes["mlp_dim"], activation=shapes["activation"])
    names = "num_experts", "top_k_experts", "moe_intermediate_size"
    if not fields.flag("enable_moe_block", False):
        fields.seen.update(names)
        return dense
    count, each, width = map(fields.integer, names)
    experts = ExpertsConfig(count, each, width, activation=dense.activation, expert_scale=True)
    return DenseAndExpertsConfig(dense, experts, NormConfig(eps=shapes["norm_eps"]))


def _write(config: ModelConfig) -> dict[str, Any]:
    mixers = [block.mixer for block in config.blocks]
    far = next((mixer for mixer in mixers if mixer.window is None), None)
    local = next((mixer for mixer in mixers if mixer.window is not None), far)
    if not isinstance(far, AttentionConfig) or not isinstance(local, AttentionConfig):
        raise ValueError("layers with full attention are needed, and no latents")
    mlp = config.blocks[0].mlp
    dense, experts = (mlp.dense, mlp.experts) if isinstance(mlp, DenseAndExpertsConfig) else (mlp, None)
    if not isinstance(dense, DenseConfig):
        raise ValueError("a dense MLP in every layer is needed, beside experts or alone")
    kinds, layer_input = {"sliding_attention": local, "full_attention": far}, config.blocks[0].layer_input
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": far.num_heads,
        "num_key_value_heads": local.num_kv_heads,
        "num_global_key_value_heads": far.num_kv_heads if far.value_is_key else None,
        "head_dim": local.head_dim,
        "global_head_dim": far.head_dim,
        "attention_k_eq_v": far.value_is_key,
        "attention_bias": far.qkv_bias,
        "intermediate_size": dense.mlp_dim,
        "hidden_activation": ACTIVATION_NAMES[dense.activation],
        "enable_moe_block": experts is not None,
        "num_experts": None if experts is None else experts.num_experts,
        "top_k_experts": None if experts is None else experts.experts_per_token,
        "moe_intermediate_size": None if experts is None else experts.mlp_dim,
        "rms_norm_eps": config.norm.eps,
        "rope_parameters": {name: _write_rope(mixer) for name, mixer in kinds.items()},
        "layer_types": ["full_attention" if m.window is None else "sliding_attention" for m in mixers],
        "sliding_window": next((mixer.window for mixer in mixers if mixer.window is not None), 512),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "final_logit_softcapping": config.logit_softcap,
        "hidden_size_per_layer_input": 0 if layer_input is None else layer_input.channels,
        "vocab_size_per_layer_input": config.vocab_size,
        "num_kv_shared_layers": sum(mixer.keys_of is not None for mixer in mixers),
        "use_double_wide_mlp": config.blocks[-1].mlp != mlp,
    }


def _write_rope(mixer: AttentionConfig) -> dict[str, Any] | None:
    if mixer.rope is None:
        raise ValueError("a rotation in every layer is needed")
    values = {"rope_theta": mixer.rope.theta, **(write_scaling(mixer.rope) or {"rope_type": "default"})}
    if mixer.rope.kind == "proportional":
        values["partial_rotary_factor"] = rotary_fraction(mixer.rope, mixer.head_dim)
    return values


def _tensors(block: BlockConfig) -> Table:
    table = {
        **tensor_tables.llama(block),
        **tensor_tables.norm("layers.mixer_post_norm", f"{_LAYER}.post_attention_layernorm"),
        **tensor_tables.norm("layers.mlp_norm", f"{_LAYER}.pre_feedforward_layernorm"),
        **tensor_tables.norm("layers.mlp_post_norm", f"{_LAYER}.post_feedforward_layernorm"),
        **tensor_tables.qk_norms(f"{_LAYER}.self_attn"),
        "layers.scale": (Source(f"{_LAYER}.layer_scalar", "s -> s"),),
        "layers.layer_input.gate": (Source(f"{_LAYER}.per_layer_input_gate.weight", "p e -> e p"),),
        "layers.layer_input.out": (Source(f"{_LAYER}.per_layer_projection.weight", "e p -> p e"),),
        **tensor_tables.norm("layers.layer_input.norm", f"{_LAYER}.post_per_layer_input_norm"),
        "layer_inputs.table": (Source("model.embed_tokens_per_layer.weight", "v i -> v i"),),
        "layer_inputs.projection": (Source("model.per_layer_model_projection.weight", "i e -> e i"),),
        **tensor_tables.norm("layer_inputs.norm", "model.per_layer_projection_norm"),
    }
    if not isinstance(block.mlp, DenseAndExpertsConfig):
        return table
    return {
        **table,
        **tensor_tables.gate_up(f"{_LAYER}.mlp", "layers.mlp.dense"),
        **tensor_tables.down(f"{_LAYER}.mlp.down_proj", "layers.mlp.dense"),
        **tensor_tables.packed_experts(f"{_LAYER}.experts", "layers.mlp.experts"),
        "layers.mlp.experts.router": (Source(f"{_LAYER}.router.proj.weight", "x e -> e x"),),
        "layers.mlp.experts.expert_scale": (Source(f"{_LAYER}.router.per_expert_scale", "x -> x"),),
        "layers.mlp.router_norm.weight": (Source(f"{_LAYER}.router.scale", "e -> e"),),
        **tensor_tables.norm("layers.mlp.dense_norm", f"{_LAYER}.pre_feedforward_layernorm"),
        **tensor_tables.norm("layers.mlp.experts_norm", f"{_LAYER}.pre_feedforward_layernorm_2"),
        **tensor_tables.norm("layers.mlp.dense_post_norm", f"{_LAYER}.post_feedforward_layernorm_1"),
        **tensor_tables.norm("layers.mlp.experts_post_norm", f"{_LAYER}.post_feedforward_layernorm_2"),
    }


GEMMA4 = Family(
    "gemma4",
    (
        *("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
        *("Gemma4UnifiedForCausalLM", "Gemma4UnifiedForConditionalGeneration"),
    ),
    ("gemma4_text", "gemma4", "gemma4_unified_text", "gemma4_unified"),
    _read,
    _write,
    _tensors,
    renames=tensor_tables.MULTIMODAL_RENAMES,
    ignored=(r"^(model\.)?(vision_tower|vision_embedder|audio_tower|embed_vision|embed_audio)\.",),
)
