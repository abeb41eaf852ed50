"""`Budget`: one total of tokens, and how many of them each layer keeps. A new rule is a file of some thirty lines.

    @dataclasses.dataclass(frozen=True)
    class Halving(Budget):
        def weights(self, total: int, layers: int, measured: np.ndarray | None, most: int) -> np.ndarray:
            return 0.5 ** np.arange(layers)

A budget that asks what a model does with a text says so (`measures`), and what of it (`measured`). It learns that from
a calibration (`sj.measure_budget`) for streams, whose sizes never change, or from the prompt at hand in `sj.compact`.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from jaxtyping import Array, Bool, Float

from streamjax.field_checks import check_fields
from streamjax.kv.cascade import Cascade
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import Sink


@dataclasses.dataclass(frozen=True)
class Budget:
    """How a total is divided. Subclasses are frozen dataclasses; `weights` is all that most of them say."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def measures(self) -> bool:
        """Whether sizes depend on what a model does with a text."""
        return False

    @property
    def measured_by(self) -> str:
        """The name under which a calibration keeps what it measures."""
        return type(self).__name__

    def measured(self, shares: Float[Array, "B K G C S"], before: Bool[Array, "B #K S"]) -> Float[Array, "B M"]:
        """What it wants to know about a layer, M numbers for each stream.

        Args:
          shares: the attention that C queries give to S tokens, in the order of the stream.
          before: which of these are tokens that came before the first of the queries.
        """
        raise NotImplementedError

    def weights(
        self, total: int, layers: int, measured: Float[np.ndarray, "L M"] | None, most: int
    ) -> Float[np.ndarray, " L"]:
        """What each layer gets in proportion: numbers of at least 0, not all 0. `most` is what one can make use of."""
        raise NotImplementedError

    def sizes(
        self,
        total: int,
        layers: int,
        measured: Float[np.ndarray, "L M"] | None = None,
        most: int | None = None,
        multiple: int = 1,
        levels: int = 0,
    ) -> tuple[int, ...]:
        """Tokens that each layer keeps, `total` together, in multiples of `multiple`: one of these at least.

        No layer keeps more than `most`, where that can be. With `levels` there are so many sizes at most (`in_levels`).

        Raises:
          ValueError: a total that is too small; a rule that measures, of which nothing is measured.
        """
        if self.measures and measured is None:
            name = type(self).__name__
            raise ValueError(f"{name} measures a model: give it a calibration, sj.measure_budget(...), or sj.compact")
        most = total if most is None else most
        return in_levels(divided(total, self.weights(total, layers, measured, most), most, multiple), levels, multiple)

    def layer(self, cascade: Cascade, size: int) -> Cascade:
        """The cache of a layer that keeps so many tokens."""
        return with_scored(cascade, dataclasses.replace(scored_tier(cascade), size=size))


def divided(
    total: int, weights: Float[np.ndarray, " L"], most: int | None = None, multiple: int = 1
) -> tuple[int, ...]:
    """Whole numbers in proportion to `weights` that add up to `total`, each from 1 to `most` (where that can be).

    Whoever is bound gets its bound, and the others share what is left; what is rounded off goes to the largest
    fractions, of equal ones to the first. With `multiple` all that is counted in so many, and a rest is not given out.

    Raises:
      ValueError: a total below one for each, or weights that are not numbers of at least 0.
    """
    layers, weights, parts = len(weights), np.asarray(weights, np.float64), total // multiple
    if parts < layers:
        raise ValueError(f"a budget of {total} tokens for {layers} layers: each needs at least {multiple}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(f"a budget's layers weigh {weights.tolist()}: numbers of at least 0, not all of them 0")
    top = max(parts if most is None else most // multiple, -(-parts // layers))
    weights = weights / weights.max()
    weights = np.where(weights < 1e-9, 0, weights)
    low, high = 0.0, parts / weights[weights > 0].min()
    for _ in range(200):  # the factor at which bounded shares add up to the total
        middle = (low + high) / 2
        enough = np.clip(middle * weights, 1, top).sum() >= parts
        low, high = (low, middle) if enough else (middle, high)
    shares = np.clip(high * weights, 1, top)
    sizes = np.floor(shares + 1e-6).astype(int)
    order = np.lexsort((np.arange(layers), -(shares - sizes)))
    while (missing := parts - sizes.sum()) > 0:
        open_to = [i for i in order if sizes[i] < top][:missing]
        sizes[open_to] += 1
    return tuple(int(size) * multiple for size in sizes)


def in_levels(sizes: tuple[int, ...], levels: int, multiple: int = 1) -> tuple[int, ...]:
    """The sizes in so many groups of layers at most, all of a group alike; as they are where `levels` is 0.

    Groups are of neighbours in size, those with the least squares between their sizes and their means. What is rounded
    off the means goes to whole groups, those first that lost the most; less than `multiple` for each layer of a group
    is not given out. No layer gets more than the largest had.

    Example:
      >>> in_levels((195, 157, 119, 81, 43, 5), levels=3)
      (176, 176, 100, 100, 24, 24)
    """
    count = len(sizes)
    if not 0 < levels < len(set(sizes)):
        return sizes
    order = np.argsort(sizes, kind="stable")
    ordered = np.array(sizes, np.float64)[order]
    sums, squares = (np.concatenate(([0.0], np.cumsum(part))) for part in (ordered, ordered**2))

    def spread(start: int, end: int) -> float:
        return squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / (end - start)

    # the least spread of the first n layers in so many groups, and where the last group starts
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *((np.inf, ()) for _ in range(count))]
    for _ in range(levels):
        best = [(np.inf, ())] + [
            min((best[start][0] + spread(start, end), (*best[start][1], start)) for start in range(end))
            for end in range(1, count + 1)
        ]
    ends = [*best[count][1], count]
    groups = [order[start:end] for start, end in itertools.pairwise(ends)]
    means = [sum(sizes[i] for i in group) / len(group) for group in groups]
    values = [int(mean // multiple) * multiple for mean in means]
    left = sum(sizes) - sum(value * len(group) for value, group in zip(values, groups, strict=True))
    while open_to := [i for i, group in enumerate(groups)
                      if len(group) * multiple <= left and values[i] + multiple <= max(sizes)]:  # fmt: skip
        most = max(open_to, key=lambda i: means[i] - values[i])
        values[most] += multiple
        left -= len(groups[most]) * multiple
    found = np.zeros(count, int)
    for value, group in zip(values, groups, strict=True):
        found[group] = value
    return tuple(map(int, found))


def scored_tier(cascade: Cascade) -> Scored:
    """The tier whose size a budget sets.

    Raises:
      ValueError: a cascade with no such tier, or with several.
    """
    tiers = [tier for tier in cascade.tiers if isinstance(tier, Scored)]
    if len(tiers) != 1:
        raise ValueError(f"a budget sets the size of a cascade's one Scored tier; {cascade!r} has {len(tiers)}")
    return tiers[0]


def with_scored(cascade: Cascade, scored: Scored) -> Cascade:
    """The cascade with another tier in the place of its `Scored`; sinks stand where its own size puts them."""
    tiers = [scored if isinstance(tier, Scored) else tier for tier in cascade.tiers]
    first = tiers[0]
    if isinstance(first, Sink) and first.reach == cascade.slots:
        tiers[0] = dataclasses.replace(first, reach=None)
    return Cascade(*tiers)
