"""`H2O`: the attention that a token has got from all queries so far (Zhang et al., 2306.14048)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from streamjax.kv.scores.score import Score


@dataclasses.dataclass(frozen=True)
class H2O(Score):
    """The sum of a token's attention, its own query's included. Query heads that share a key head vote together."""

    needs_attention: ClassVar[bool] = True
