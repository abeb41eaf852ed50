"""A mixture of experts as an MLP, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from streamjax.field_checks import NotNegative, Positive, Size, check_fields
from streamjax.models.config.dense import Activation, DenseConfig
from streamjax.models.config.norm import NormConfig


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """MLPs of width `mlp_dim`, of which a router chooses `experts_per_token` for each token (1701.06538).

    normalize_weights: the weights of a token's experts sum to 1, which is a softmax over the chosen experts' scores
      (Mixtral); without, they are their part of a softmax over all experts (Qwen1.5-MoE).
    shared: an expert that every token passes through, besides the chosen ones.
    bias, router_bias: whether the experts' projections, and the router's scores, have biases.
    swiglu_limit: an expert computes `(up + 1) * gate * sigmoid(swiglu_alpha * gate)`, its gate at most this large and
      its up projection at most this far from 0 (gpt-oss). None: `activation(gate) * up`.
    scores: of the router: a softmax over all experts, or a sigmoid of each (DeepSeek-V3).
    groups, groups_per_token: experts are chosen from so many of so many groups of neighbours alone.
    group_rank: a group counts by its best expert, or by the sum of its two best (DeepSeek-V3).
    selection_bias: scores have a bias for each expert while experts are chosen, which their weights do not see.
    weight_scale: factor on the weights.
    expert_scale: an expert's weights are multiplied by a learned number of its own (Gemma 4).
    weighted: what the weights multiply: what an expert returns, or what it reads (Llama 4).
    gated: an expert is `down(activation(gate(x)) * up(x))`; without, `down(activation(up(x)))` (Nemotron-H).
    latent: experts read so many channels, which one projection makes of a token's, and another takes what they return
      back; the router and the shared expert read the token. None: experts read the token (Nemotron 3).
    latent_bias: whether these two projections have biases.
    shared_gate: what the shared expert returns is multiplied by a sigmoid of its own for each token (Qwen2-MoE).
    balance_loss, z_loss: coefficients of the losses that keep a router's choices even (2101.03961) and its logits small
      (2202.08906), whose gradients are added to the loss's; see `mlps/routing_losses.py`.
    """

    type_name: ClassVar[str] = "experts"
    own_norms: ClassVar[bool] = False

    num_experts: Size
    experts_per_token: Size
    mlp_dim: Size
    activation: Activation = "silu"
    normalize_weights: bool = True
    shared: DenseConfig | None = None
    shared_gate: bool = False
    bias: bool = False
    router_bias: bool = False
    swiglu_limit: Positive | None = None
    swiglu_alpha: Positive = 1.702
    balance_loss: NotNegative = 0.0
    z_loss: NotNegative = 0.0
    scores: Literal["softmax", "sigmoid"] = "softmax"
    groups: Size = 1
    groups_per_token: Size = 1
    group_rank: Literal["best", "two best"] = "best"
    selection_bias: bool = False
    weight_scale: Positive = 1.0
    expert_scale: bool = False
    weighted: Literal["outputs", "inputs"] = "outputs"
    gated: bool = True
    latent: Size | None = None
    latent_bias: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"ExpertsConfig.experts_per_token is {self.experts_per_token}: there are {self.num_experts} experts"
            )
        each = self.num_experts // self.groups
        if self.num_experts % self.groups or self.groups_per_token > self.groups:
            raise ValueError(
                f"ExpertsConfig.groups is {self.groups}: {self.num_experts} experts must divide into as many "
                f"groups, of which {self.groups_per_token} are for a token"
            )
        if self.experts_per_token > each * self.groups_per_token or (self.group_rank == "two best" and each < 2):
            raise ValueError(
                f"ExpertsConfig.groups is {self.groups}: {self.groups_per_token} of them have too few experts "
                f"to choose {self.experts_per_token}"
            )
        if not self.gated and self.swiglu_limit is not None:
            raise ValueError("ExpertsConfig.swiglu_limit is for experts with a gate: it needs gated=True")
        if self.latent is None and self.latent_bias:
            raise ValueError("ExpertsConfig.latent_bias needs a latent")
        if self.shared_gate and self.shared is None:
            raise ValueError("ExpertsConfig.shared_gate needs a shared expert")

    def parameter_count(self, d_model: int) -> int:
        """Number of parameters in a model of `d_model` channels."""
        shared = 0 if self.shared is None else self.shared.parameter_count(d_model) + self.shared_gate * d_model
        shared += (self.selection_bias + self.expert_scale) * self.num_experts
        if self.latent is not None:
            shared += 2 * d_model * self.latent + self.latent_bias * (d_model + self.latent)
        return self.num_experts * (d_model + self.router_bias + self.expert_parameters(d_model)) + shared

    @property
    def ups(self) -> int:
        """Projections that an expert makes of its input: one, and its gate if it has one."""
        return 1 + self.gated

    def expert_parameters(self, d_model: int) -> int:
        """Number of parameters of one expert."""
        width = self.latent or d_model
        return (self.ups + 1) * width * self.mlp_dim + self.bias * (self.ups * self.mlp_dim + width)


@dataclasses.dataclass(frozen=True)
class DenseAndExpertsConfig:
    """A dense MLP and a mixture of experts beside each other, whose outputs are added (Gemma 4).

    Each has norms of its own before and behind it, and the router one that it reads through; all read what the layer
    hands on unnormed.

    norm: of all five.
    """

    type_name: ClassVar[str] = "dense_and_experts"
    own_norms: ClassVar[bool] = True

    dense: DenseConfig
    experts: ExpertsConfig
    norm: NormConfig = NormConfig()

    def __post_init__(self) -> None:
        check_fields(self)

    def parameter_count(self, d_model: int) -> int:
        """Number of parameters in a model of `d_model` channels."""
        parts = self.dense.parameter_count(d_model) + self.experts.parameter_count(d_model)
        return parts + 5 * self.norm.parameter_count(d_model)
