"""What one layer holds while it is computed and while its gradient is, fitted to compiled programs."""

from __future__ import annotations

import math

from streamjax.attention.recurrent import BLOCK
from streamjax.models.config import (
    BlockConfig,
    DenseAndExpertsConfig,
    ExpertsConfig,
    GatedDeltaConfig,
    KimiDeltaConfig,
    MLPConfig,
)
from streamjax.models.config.recurrent import RecurrentConfig


def working_bytes(block: BlockConfig, d_model: int, tokens: int, item: int, wide: int) -> int:
    """What the backward pass of one layer holds at its worst for `tokens` tokens, beyond its input, KV and weights.

    Four arrays as wide as the MLP (three where it is not gated); the heads' outputs twice, once in the accumulator's
    dtype; two arrays as wide as the model; and what the norms of queries and keys save. Experts: as many arrays of an
    expert's width for each that a token has, two as wide as the model for its copies sorted by expert and their
    outputs, and three of the router's scores.
    """
    mixer = block.mixer
    if isinstance(mixer, RecurrentConfig):
        inside = _recurrent_working(mixer, item, wide) + 2 * d_model * item
        return tokens * (inside + _mlp_working(block.mlp, d_model, item, wide))
    beside = 0 if block.beside is None else _recurrent_working(block.beside, item, wide) + d_model * item
    heads, keys = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
    mlp = _mlp_working(block.mlp, d_model, item, wide)
    norms = 3 * wide * (heads + keys) * (mixer.qk_norm is not None)
    return tokens * (mlp + beside + heads * (item + wide) + 2 * keys * item + norms + 2 * d_model * item)


def saved_bytes(block: BlockConfig, d_model: int, tokens: int, item: int, wide: int) -> int:
    """What `jax.grad` saves of one layer for `tokens` tokens: the operands that its derivative reads.

    Of a norm three arrays in the accumulator's dtype; the operands of each product; of the activation's formula one
    array an operation. Of experts the same for each that a token has, with two arrays as wide as the model, and three
    of the router's scores.
    """
    mixer = block.mixer
    norms = 3 * wide * (d_model * block.norm_count)
    if isinstance(mixer, RecurrentConfig):
        inside = _recurrent_saved(mixer, item, wide) + 2 * d_model * item
        return tokens * (norms + inside + _mlp_saved(block.mlp, d_model, item, wide))
    heads, keys = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
    norms += 3 * wide * (heads + keys) * (mixer.qk_norm is not None)
    attention = heads * (item + wide) + 2 * keys * item
    operands = item * (2 * d_model + heads)
    operands += 0 if block.beside is None else _recurrent_saved(block.beside, item, wide) + d_model * item
    return tokens * (norms + attention + operands + _mlp_saved(block.mlp, d_model, item, wide))


def found_numbers(block: BlockConfig) -> int:
    """What attention finds of one token: each head's output, and its log-sum-exp."""
    mixer = block.mixer
    return 0 if isinstance(mixer, RecurrentConfig) else mixer.num_heads * (mixer.head_dim + 1)


def state_bytes(mixer: RecurrentConfig, item: int, wide: int) -> int:
    """A recurrent layer's state, of one row."""
    memory = math.prod(mixer.state_shape) * wide if mixer.state_shape else 0
    return memory + math.prod(mixer.conv_shape) * item


def _recurrent_working(mixer: RecurrentConfig, item: int, wide: int) -> int:
    """`working_bytes` of a recurrent mixer, for one token.

    What its input becomes, before and behind the convolution and in the accumulator's dtype; of each head a row of the
    block's pairs a few times; its share of the states at the borders of blocks; and of prefix linear attention features
    in 14 arrays.
    """
    projected = mixer.projected * (2 * item + 2 * wide)
    if not mixer.state_shape:
        return projected
    heads, rows, columns = mixer.state_shape
    projected += 14 * heads * rows * wide * mixer.looks_ahead
    return projected + 3 * heads * BLOCK * wide + 2 * heads * rows * columns * wide // BLOCK


def _recurrent_saved(mixer: RecurrentConfig, item: int, wide: int) -> int:
    """`saved_bytes` of a recurrent mixer, for one token: of the delta rule the triangular systems too."""
    systems = 0
    if isinstance(mixer, GatedDeltaConfig | KimiDeltaConfig):
        systems = 6 * mixer.num_heads * (mixer.key_dim + mixer.value_dim) * wide
    return _recurrent_working(mixer, item, wide) + mixer.projected * (2 * item + 2 * wide) + systems


def _mlp_working(mlp: MLPConfig | None, d_model: int, item: int, wide: int) -> int:
    """`working_bytes` of an MLP, for one token."""
    if mlp is None:
        return 0
    if isinstance(mlp, DenseAndExpertsConfig):
        return sum(_mlp_working(part, d_model, item, wide) for part in (mlp.dense, mlp.experts)) + 5 * d_model * wide
    if isinstance(mlp, ExpertsConfig):
        each = ((2 + mlp.ups) * mlp.mlp_dim + 2 * (mlp.latent or d_model)) * item
        shared = 0 if mlp.shared is None else _mlp_working(mlp.shared, d_model, item, wide)
        return mlp.experts_per_token * each + 3 * mlp.num_experts * wide + shared
    return (4 if mlp.gated else 3) * mlp.mlp_dim * item


def _mlp_saved(mlp: MLPConfig | None, d_model: int, item: int, wide: int) -> int:
    """`saved_bytes` of an MLP, for one token."""
    if mlp is None:
        return 0
    if isinstance(mlp, DenseAndExpertsConfig):
        return sum(_mlp_saved(part, d_model, item, wide) for part in (mlp.dense, mlp.experts)) + 15 * d_model * wide
    steps = {"relu": 2, "relu2": 3, "silu": 4, "gelu": 6, "gelu_tanh": 6}[mlp.activation]
    if isinstance(mlp, ExpertsConfig):
        steps += 3 * (mlp.swiglu_limit is not None)
        each = item * (mlp.mlp_dim * (steps + 2 * mlp.gated) + 2 * (mlp.latent or d_model))
        shared = 0 if mlp.shared is None else _mlp_saved(mlp.shared, d_model, item, wide)
        return mlp.experts_per_token * each + 3 * mlp.num_experts * wide + shared
    return item * mlp.mlp_dim * (steps + (2 if mlp.gated else 0))
