"""At which level the next part of a stream's keys and values is sent, so that all come in time (CacheGen, 5.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Choice:
    """level: of the bitstream; None: send the text, and let the model read it. seconds: until all is there."""

    level: int | None
    seconds: float


def choose(
    sizes: Sequence[float], *, bandwidth: float, seconds: float, text_seconds: float, text_size: float = 0.0
) -> Choice:
    """The least lossy way in which what is left comes in time, if it goes on as fast as the last part did.

    It is asked again before each part: with what is left then, and with the bandwidth that the last part had. Reading
    the text loses nothing and comes first, then the levels from the finest on; the fastest where nothing comes in time.

    >>> choose([3e6, 2e6, 1e6], bandwidth=1e6, seconds=2.5, text_seconds=4.0)
    Choice(level=1, seconds=2.0)

    Args:
      sizes: bytes of all that is left, at each level from the finest on.
      bandwidth: bytes a second.
      seconds: left until the answer has to begin.
      text_seconds: that the model takes to read what is left.
      text_size: bytes of its text.

    Raises:
      ValueError: no levels, a size below 0, or a bandwidth that is not above 0.
    """
    if not sizes or min(sizes) < 0:
        raise ValueError(f"sizes is {list(sizes)}: it must have the bytes of at least one level, none of them below 0")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}: it must be above 0, bytes a second")
    ways = [Choice(None, text_size / bandwidth + text_seconds)]
    ways += [Choice(level, size / bandwidth) for level, size in enumerate(sizes)]
    return next((way for way in ways if way.seconds <= seconds), min(ways, key=lambda way: way.seconds))
