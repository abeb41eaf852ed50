"""Mamba-2 (2405.21060), which Codestral Mamba is one of: layers of the state space duality and nothing else."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, ModelConfig, NormConfig, SSDConfig
from streamjax.models.families import recurrent_tables, tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Table

_LAYER = "backbone.layers.{layer}"
# The initial weights, kernels, and a residual stream in float32, which it is here where activations are.
_UNUSED = """
    chunk_size expand hidden_act norm_before_gate rescale_prenorm_residual residual_in_fp32 rms_norm time_step_floor
    time_step_init_scheme time_step_max time_step_min time_step_rank time_step_scale
"""


def read_step_limits(fields: Fields, name: str) -> tuple[float, float | None]:
    """Bounds on a token's step; None: no upper one, which is written as infinity in one of two ways."""
    limits = fields.get(name, list, None) or [0.0, float("inf")]
    if len(limits) == 2:
        low, high = limits
        high = None if high in ({"__float__": "Infinity"}, float("inf")) else high
        numbers = [low] if high is None else [low, high]
        if all(type(number) in (int, float) and 0 <= number < 1e30 for number in numbers):
            return float(low), None if high is None else float(high)
    raise ValueError(f"field {name!r} is {limits!r:.80}; expected a lower and an upper bound")


def _read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", ("silu", "swish"), "silu")
    fields.only("norm_before_gate", (False,), False)
    fields.only("rms_norm", (True,), True)
    fields.seen.update(_UNUSED.split())
    d_model, heads = fields.integer("hidden_size"), fields.integer("num_heads", 128)
    width, expand = fields.integer("head_dim", 64), fields.positive("expand", 2.0)
    if int(expand * d_model) != heads * width:
        raise ValueError(f"num_heads {heads} x head_dim {width} is not expand x hidden_size, {int(expand * d_model)}")
    norm = NormConfig("rms", fields.positive("layer_norm_epsilon", 1e-5))
    low, high = read_step_limits(fields, "time_step_limit")
    mixer = SSDConfig(
        num_heads=heads,
        num_groups=fields.integer("n_groups", 8),
        head_dim=width,
        state_dim=fields.integer("state_size", 128),
        conv_width=fields.integer("conv_kernel", 4),
        conv_bias=fields.flag("use_conv_bias", True),
        bias=fields.flag("use_bias", False),
        norm=norm,
        step_min=low,
        step_max=high,
    )
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=d_model,
        blocks=(BlockConfig(mixer, None, norm),) * fields.integer("num_hidden_layers"),
        family="mamba2",
        norm=norm,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=fields.integer("max_position_embeddings", 2048),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer = config.blocks[0].mixer
    if not isinstance(mixer, SSDConfig):
        raise ValueError("its layers are not Mamba-2's")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "expand": whole(mixer.num_heads * mixer.head_dim / config.d_model),
        "n_groups": mixer.num_groups,
        "state_size": mixer.state_dim,
        "conv_kernel": mixer.conv_width,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm.eps,
        "time_step_limit": write_step_limits(mixer),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
    }


def whole(number: float) -> float:
    """A whole number as an int, which is what transformers wants where there is one."""
    return int(number) if number == int(number) else number


def write_step_limits(mixer: SSDConfig) -> list[Any]:
    """The inverse of `read_step_limits`, as transformers 5 writes it."""
    return [mixer.step_min, {"__float__": "Infinity"} if mixer.step_max is None else mixer.step_max]


def _tensors(block: BlockConfig) -> Table:
    mixer = block.mixer
    return {
        **tensor_tables.embedding_and_head("backbone.embeddings", "backbone.norm_f"),
        **tensor_tables.norm("layers.mixer_norm", f"{_LAYER}.norm"),
        **(recurrent_tables.ssd(mixer, f"{_LAYER}.mixer") if isinstance(mixer, SSDConfig) else {}),
    }


MAMBA2 = Family(
    "mamba2",
    ("Mamba2ForCausalLM",),
    ("mamba2",),
    _read,
    _write,
    _tensors,
    renames=((r"^backbone\.embedding\.", "backbone.embeddings."),),
)
