"""How long a group of devices takes for sequences that it reads together, and how many tokens it can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from streamjax.field_checks import NotNegative, Size, check_fields
from streamjax.models.config import AttentionConfig, LatentAttentionConfig, ModelConfig, UniformConfig, expanded


@dataclasses.dataclass(frozen=True)
class GroupCosts:
    """Seconds of a forward and a backward pass, by the lengths of sequences.

    A group of d devices shares each of its sequences (the mesh axis `context`). So it takes

        sum((quadratic * n + linear) * n for n in lengths) / d + exchanged * sum(lengths) * (d - 1) / d + (d - 1) * turn

    Attributes:
      quadratic: seconds on one device a pair of tokens, of attention to all tokens.
      linear: seconds on one device a token.
      exchanged: seconds a token whose keys and values come from another device.
      far_exchanged: the same in groups of more than `near` devices, whose links are slower.
      near: devices with fast links between them.
      turn: seconds that a group loses for each device besides the first, however short its sequences.
      tokens_per_device: so many a device can hold.
    """

    quadratic: NotNegative
    linear: NotNegative
    exchanged: NotNegative
    tokens_per_device: Size
    far_exchanged: NotNegative = 0.0
    near: Size = 2**31 - 1
    turn: NotNegative = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of_model(
        cls,
        config: ModelConfig | UniformConfig,
        *,
        flops: float,
        bandwidth: float,
        tokens_per_device: int,
        far_bandwidth: float | None = None,
        near: int = 2**31 - 1,
        turn: float = 0.0,
    ) -> GroupCosts:
        """Of a model with activations of two bytes.

        Args:
          config: the model.
          flops: floating-point operations that a device does in a second.
          bandwidth: bytes that a device receives from others in a second.
          far_bandwidth: the same in groups of more than `near` devices.
        """
        config = expanded(config)
        pairs = per_token = received = 0.0
        for block in config.blocks:
            mixer = block.mixer
            if not isinstance(mixer, AttentionConfig | LatentAttentionConfig):
                continue
            # Scores and values, two operations each, of half of all pairs; twice that backwards.
            pair = 6.0 * mixer.num_heads * mixer.head_dim
            reach = (mixer.window or mixer.chunk) if isinstance(mixer, AttentionConfig) else None
            if reach is None:
                pairs += pair
                heads = mixer.num_kv_heads if isinstance(mixer, AttentionConfig) else mixer.num_heads
                received += 3 * 2 * 2 * heads * mixer.head_dim  # keys and values, these again and their gradients
            else:
                per_token += 2 * pair * reach
        return cls(
            quadratic=pairs / flops,
            linear=(6.0 * config.parameter_count + per_token) / flops,
            exchanged=received / bandwidth,
            far_exchanged=received / (far_bandwidth or bandwidth),
            near=near,
            turn=turn,
            tokens_per_device=tokens_per_device,
        )

    def sequence(self, length: float, degree: int) -> float:
        """Seconds that a sequence adds to a group of `degree` devices."""
        each = self.exchanged if degree <= self.near else self.far_exchanged
        alone = (self.quadratic * length + self.linear) * length
        return (alone + each * length * (degree - 1)) / degree

    def group(self, lengths: Iterable[float], degree: int) -> float:
        """Seconds of a group; 0 of one without sequences."""
        seconds = [self.sequence(length, degree) for length in lengths]
        return sum(seconds) + (degree - 1) * self.turn if seconds else 0.0
