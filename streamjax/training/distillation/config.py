"""Which teacher, and which of its layers become what."""

from __future__ import annotations

import dataclasses
from typing import Literal

from streamjax.field_checks import Count, Size, check_fields
from streamjax.models.config.block import RecurrentMixerConfig


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A student of a pretrained model, some of whose layers have other token mixers.

    Attributes:
      teacher: a Hugging Face folder, a .gguf file or a streamjax checkpoint; None: the run has no teacher.
      layers: which layers of `init_from` are changed; those that have these mixers already stay as they are.
      recurrent: the mixer in attention's place, or beside a window; see `models.conversion.convert_layers`.
      window: the window of these layers' attention; None, with `recurrent`: they have no attention.
      sinks: first tokens that such a window sees, too.
      trained: "converted" trains the mixers of `layers` alone, "recurrent" of these the recurrent ones alone, so that
        windows beside them attend as the teacher does; "all" every weight.
    """

    teacher: str | None = None
    layers: tuple[Count, ...] = ()
    recurrent: RecurrentMixerConfig | None = None
    window: Size | None = None
    sinks: Count = 0
    trained: Literal["converted", "recurrent", "all"] = "converted"

    def __post_init__(self) -> None:
        check_fields(self)
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"DistillConfig.layers must name layers in order, got {self.layers!r}")
        if self.sinks and self.window is None:
            raise ValueError(f"DistillConfig.sinks is {self.sinks}, and they stand in front of a window: set window")
        if self.layers and self.recurrent is None and self.trained == "recurrent":
            raise ValueError('DistillConfig.trained is "recurrent", and layers become windows alone: set recurrent')
        if self.layers and self.recurrent is None and self.window is None:
            raise ValueError(
                "DistillConfig.layers become a recurrent mixer, a window, or both: set recurrent or window"
            )
