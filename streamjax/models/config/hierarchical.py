"""Hierarchical sparse attention, in words."""

from __future__ import annotations

import dataclasses

from streamjax.field_checks import LATER, Count, Size, check_fields
from streamjax.models.config.attention import AttentionConfig
from streamjax.models.config.block import BlockConfig
from streamjax.models.config.dense import DenseConfig


@dataclasses.dataclass(frozen=True)
class HSAConfig:
    """Hierarchical sparse attention (2504.16795; HSA-UltraLong, 2511.23319): which layers remember, which read.

    The inputs of the layers in `memory_layers` are cut into chunks of `chunk_size` tokens, which a bidirectional
    encoder of `encoder_layers` layers turns into keys, values and landmarks. Every layer in `layers` reads, behind its
    own attention, the `top_k` best chunks of the memory of the last memory layer at or below it.
    `memory_layers=(L / 2,)` and some of the upper layers is HSA-UltraLong's shape; `memory_layers == layers` gives each
    reading layer a memory of its own.

    attention, mlp: the heads and the MLP of the encoder's layers, and the heads of what reads; those of the layer in
    question where None. Layers with a recurrent mixer have neither (RAMba, 2504.16795: Mamba-2 with HSA).

    Example:
      >>> hsa = sj.HSAConfig(layers=(15, 20, 25), memory_layers=(15,))  # for a model of 30 layers
      >>> hsa.chunk_size, hsa.top_k
      (64, 8)
    """

    layers: tuple[Count, ...]
    memory_layers: tuple[Count, ...]
    chunk_size: Size = 64
    top_k: Size = 8
    encoder_layers: Size = 1
    attention: AttentionConfig | None = dataclasses.field(default=None, metadata=LATER)
    mlp: DenseConfig | None = dataclasses.field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("layers", "memory_layers"):
            value = getattr(self, name)
            if not value or list(value) != sorted(set(value)):
                raise ValueError(f"HSAConfig.{name} must name layers in order, got {value!r}")
        if self.layers[0] < self.memory_layers[0]:
            raise ValueError(
                f"HSAConfig.layers begin at {self.layers[0]}, below the first of memory_layers, {self.memory_layers[0]}"
            )

    def of_layer(self, block: BlockConfig) -> BlockConfig:
        """The layer whose heads, MLP and norms encoders and readers of `block` have.

        Raises:
          ValueError: the layer lacks them, and `attention` or `mlp` does not say which.
        """
        heads = self.attention if self.attention is not None else block.attention
        return dataclasses.replace(block, mixer=heads, mlp=self.mlp or block.mlp, beside=None)
