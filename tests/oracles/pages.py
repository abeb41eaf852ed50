"""`Sink > Window > Pages` token by token in float64 numpy: plain lists, one query at a time, one key head at a time.

Quest's rule (2406.10774, algorithm 1) with LServe's logical pages (2502.14866, section 3.5): a page's score is the sum
over channels of max(q * smallest, q * largest key value), the best of its logical pages; with several query heads a key
head, the best of them. The `top_k` best pages are attended. With a `distance` all paged tokens stand that far behind
every query (InfLLM, 2402.04617, section 3.2). Nothing here comes from the library.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from tests.oracles.rotation import Turning


@dataclasses.dataclass(frozen=True)
class Rule(Turning):
    """Sizes, how a page is scored, `score(keys [n, D], q [D])`, and how positions enter."""

    heads: int
    sinks: int
    window: int
    size: int
    capacity: int
    top_k: int
    score: Callable[[np.ndarray, np.ndarray], float]
    scale: float
    slopes: tuple[float, ...] | None = None
    frequencies: tuple[float, ...] | None = None
    distance: int | None = None
    representatives: int | None = (
        None  # InfLLM: most attended keys, one choice for all heads by the mean of their scores
    )
    newest: bool = False  # the page that is not full is always read
    forgets: bool = False  # a page is scored by the tokens that it still has
    coarse: tuple[int, int] | None = None  # MPCache: runs of so many pages of the buffer, of which so many compete

    def places(self, query: int, token: int, paged: bool) -> tuple[int, int]:
        """Where query and token stand towards each other."""
        return (self.distance, 0) if paged and self.distance is not None else (query, token)

    def logit(self, h: int, q: np.ndarray, query: int, key: np.ndarray, token: int, paged: bool) -> float:
        here, there = self.places(query, token, paged)
        bias = 0.0 if self.slopes is None else self.slopes[h] * (here - there)
        return self.scale * self.turned(q, here) @ self.turned(key, there) - bias


class Stream:
    """The lists of one stream; an entry is (key [K, D], value [K, D], index in the stream), keys not rotated."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.first: list = []
        self.recent: list = []
        self.paged: list = []
        self.page_of: dict[int, int] = {}
        self.mass: dict[tuple[int, int], float] = {}  # attention that a token got outside of the pages: (head, token)
        self.summarised: dict[int, list] = {}  # of all tokens that a page ever held: it outlives those that had to go

    def read(self, q: np.ndarray, entry: tuple) -> np.ndarray:
        """The output [H, D] of the token `entry`, whose queries are `q`; then it is stored."""
        out = np.zeros_like(q)
        chosen = None if self.rule.representatives is None else self.best_for_all(q)
        for head in range(self.rule.heads):
            group = range(head * len(q) // self.rule.heads, (head + 1) * len(q) // self.rule.heads)
            best = self.best(q, group, head, entry[2]) if chosen is None else chosen
            visible = [(e, False) for e in [*self.first, *self.recent, entry]]
            visible += [(e, True) for e in self.paged if self.page_of[e[2]] in best]
            for h in group:
                logits = [self.rule.logit(h, q[h], entry[2], e[0][head], e[2], paged) for e, paged in visible]
                weights = np.exp(np.array(logits) - max(logits))
                for (e, paged), weight in zip(visible, weights / weights.sum(), strict=True):
                    if not paged:
                        self.mass[h, e[2]] = self.mass.get((h, e[2]), 0.0) + weight
                out[h] = weights @ np.array([e[1][head] for e, _ in visible]) / weights.sum()
        self.take(entry)
        return out

    def best(self, q: np.ndarray, group: range, head: int, place: int) -> list[int]:
        newest = {self.page_of[e[2]]: e[2] for e in self.paged}
        held = {e[2] for e in self.paged}

        def value(*pages: int) -> float:
            found, summarised = [], [entry for page in pages for entry in self.summarised[page]]
            if self.rule.forgets:
                summarised = [entry for entry in summarised if entry[1] in held]
            for h in group:
                here, nearest = self.rule.places(place, max(newest[page] for page in pages), True)
                stored = [(key[head], self.rule.places(place, i, True)[1]) for key, i in summarised]
                keys = [self.rule.turned(key, there) for key, there in stored]
                bias = 0.0 if self.rule.slopes is None else self.rule.slopes[h] * (here - nearest)
                found.append(self.rule.scale * self.rule.score(np.array(keys), self.rule.turned(q[h], here)) - bias)
            return max(found)

        if self.rule.coarse is not None:
            size, count = self.rule.coarse
            runs: dict[int, list[int]] = {}
            for page in newest:
                runs.setdefault(page % (self.rule.capacity // self.rule.size + 1) // size, []).append(page)
            best = sorted(runs.values(), key=lambda pages: value(*pages), reverse=True)[:count]
            newest = {page: newest[page] for pages in best for page in pages}
        return sorted(newest, key=value, reverse=True)[: self.rule.top_k]

    def best_for_all(self, q: np.ndarray) -> list[int]:
        """Pages whose most attended keys, averaged, fit the queries of all heads best; the open page is one of them."""
        pages = sorted({self.page_of[e[2]] for e in self.paged})

        def value(page: int) -> float:
            keys, found = self.summarised[page], []
            if self.rule.newest and page == pages[-1] and len(keys) < self.rule.size:
                return math.inf
            for h in range(len(q)):
                ranked = sorted(keys, key=lambda key: self.mass[h, key[1]], reverse=True)[: self.rule.representatives]
                mean = np.mean([key[h * self.rule.heads // len(q)] for key, _ in ranked], axis=0)
                found.append(self.rule.turned(q[h], self.rule.distance) @ mean)
            return float(np.mean(found))

        return sorted(pages, key=value, reverse=True)[: self.rule.top_k]

    def take(self, entry: tuple) -> None:
        """To the sinks, else into the window, whose oldest token goes to the pages, whose oldest token goes."""
        if len(self.first) < self.rule.sinks:
            self.first.append(entry)
            return
        self.recent.append(entry)
        if len(self.recent) <= self.rule.window:
            return
        falling = self.recent.pop(0)
        page = len(self.page_of) // self.rule.size
        self.page_of[falling[2]] = page
        self.summarised.setdefault(page, []).append((falling[0], falling[2]))
        self.paged = [*self.paged, falling][-self.rule.capacity :]


def bounds(parts: int, size: int):
    """max over logical pages of sum over channels of max(q * low, q * high)."""

    def score(keys: np.ndarray, q: np.ndarray) -> float:
        width = size // parts
        pieces = [keys[i : i + width] for i in range(0, len(keys), width)]
        return max(np.maximum(q * piece.min(axis=0), q * piece.max(axis=0)).sum() for piece in pieces)

    return score


def blended(high: float):
    """The product with what lies between the bounds."""

    def score(keys: np.ndarray, q: np.ndarray) -> float:
        return float(q @ (high * keys.max(axis=0) + (1 - high) * keys.min(axis=0)))

    return score


def means(power: float):
    """The mean key, times the number of keys to a power."""

    def score(keys: np.ndarray, q: np.ndarray) -> float:
        return float(q @ keys.mean(axis=0)) * len(keys) ** power

    return score
