"""Rotary position embedding, in words."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from streamjax.field_checks import Interval, NotNegative, Positive, Size, check_fields

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base, width and one of the published ways to scale it to longer contexts.

    `rotary_dim` is the number of leading channels of a head that rotate (`None`: all of them); an odd one rotates one
    channel more, at the frequencies of the odd width, as GPT-NeoX does. Of kind "proportional" (Gemma 4) as many
    rotate, spread over both halves of the head: pairs and frequencies are the whole head's, and those of the rest are
    0. Fields that a kind does not use play no part. Names follow Hugging Face's `rope_scaling`, whose meaning they
    have.

    Example:
      >>> sj.RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_max_position=8192).factor
      8.0
      >>> sj.RopeConfig(kind="yarn", factor=4.0)
      Traceback (most recent call last):
      ValueError: RopeConfig.kind 'yarn' needs a positive original_max_position
    """

    theta: Annotated[float, Interval(1, above=True)] = 10_000.0
    rotary_dim: Size | None = None
    kind: RopeKind = "default"
    factor: Positive = 1.0
    original_max_position: Size | None = None
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None
    attention_factor: Positive | None = None
    short_factor: tuple[Positive, ...] = ()
    long_factor: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind in ("dynamic", "llama3", "yarn", "longrope") and self.original_max_position is None:
            raise ValueError(f"RopeConfig.kind {self.kind!r} needs a positive original_max_position")
        if self.rotary_dim is not None and self.rotary_dim % 2 and self.kind in ("yarn", "proportional"):
            raise ValueError(f"RopeConfig.rotary_dim is {self.rotary_dim}: it must be even for {self.kind}")
        # llama3's two may be equal, with no blend between long wavelengths and short ones (Llama 4 Scout).
        for kind, low, high, wanted in (
            ("llama3", "low_freq_factor", "high_freq_factor", "not be smaller"),
            ("yarn", "beta_slow", "beta_fast", "be larger"),
        ):
            one, other = getattr(self, low), getattr(self, high)
            if self.kind == kind and (one > other or (one == other and kind == "yarn")):
                raise ValueError(f"RopeConfig.{low} is {one} and {high} {other}: for {kind} the second must {wanted}")
        if self.kind == "longrope" and not (self.short_factor and self.long_factor):
            raise ValueError("RopeConfig.kind 'longrope' needs short_factor and long_factor, one a channel pair")

    def check_width(self, head_dim: int) -> None:
        """Refuse a rotation that does not fit heads of `head_dim` channels.

        Raises:
          ValueError: it is wider than a head, or odd where it must be even, or its factors are not one a channel pair.
        """
        width = head_dim if self.rotary_dim is None else self.rotary_dim
        if self.rotary_dim is None and head_dim % 2:
            raise ValueError(f"AttentionConfig.head_dim {head_dim} is odd: set RopeConfig.rotary_dim to an even width")
        if head_dim % 2 and self.kind == "proportional":
            raise ValueError(
                f"AttentionConfig.head_dim {head_dim} is odd: RopeConfig.kind 'proportional' has pairs of all"
            )
        if width + width % 2 > head_dim:
            raise ValueError(f"RopeConfig.rotary_dim {width} does not fit in head_dim {head_dim}")
        if self.kind == "dynamic" and width <= 2:
            raise ValueError(f"RopeConfig.kind 'dynamic' needs more than 2 channels that rotate, and has {width}")
        for name in ("short_factor", "long_factor") if self.kind == "longrope" else ():
            have, pairs = len(getattr(self, name)), (width + 1) // 2
            if have != pairs:
                raise ValueError(f"RopeConfig.{name} has {have} factors: longrope needs {pairs}, one a channel pair")
