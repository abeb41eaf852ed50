"""`Sink > Window > Scored` token by token in float64 numpy: plain lists, one query at a time, one key head at a time.

Each key head keeps a list of its own. After every `every` tokens of the stream it is cut to the `size` tokens that a
rule ranks highest; of equals the newest stay. All that any query ever gave is in `log`, so a rule about attention is a
sum over it. Nothing here comes from the library.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from tests.oracles.rotation import Turning


@dataclasses.dataclass(frozen=True)
class Rule(Turning):
    """Sizes, how tokens are ranked, `score(stream, head, entries) -> numbers`, and how positions enter."""

    heads: int
    sinks: int
    window: int
    size: int
    every: int
    score: Callable
    scale: float
    slopes: tuple[float, ...] | None = None
    frequencies: tuple[float, ...] | None = None
    distance: int | None = None
    together: bool = False
    coded: Callable | None = None  # what a row of numbers becomes when it is stored


class Stream:
    """The lists of one stream; an entry is (key [K, D], value [K, D], index in the stream), keys not rotated."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.first: list = []
        self.recent: list = []
        self.kept: list[list] = [[] for _ in range(rule.heads)]
        self.log: list[dict[tuple[int, int], float]] = []  # of each query: (query head, token) -> share
        self.queries: list[np.ndarray] = []
        self.noted: dict = {}  # for rules that remember

    def read(self, q: np.ndarray, entry: tuple) -> np.ndarray:
        """The output [H, D] of the token `entry`, whose queries are `q`; then it is stored."""
        rule, out, shares = self.rule, np.zeros_like(q), {}
        for head in range(rule.heads):
            visible = [(e, False) for e in [*self.first, *self.recent, entry]]
            visible += [(e, rule.distance is not None) for e in self.kept[head]]
            for h in self.group(head, len(q)):
                logits = []
                for (key, _, place), far in visible:
                    here, there = (rule.distance, 0) if far else (entry[2], place)
                    bias = 0.0 if rule.slopes is None else rule.slopes[h] * (here - there)
                    logits.append(rule.scale * rule.turned(q[h], here) @ rule.turned(key[head], there) - bias)
                weights = np.exp(np.array(logits) - max(logits))
                weights /= weights.sum()
                out[h] = weights @ np.array([e[1][head] for e, _ in visible])
                shares |= {(h, e[2]): w for (e, _), w in zip(visible, weights, strict=True)}
        self.log.append(shares)
        self.queries.append(q)
        self.take(entry)
        return out

    def group(self, head: int, count: int) -> range:
        """The query heads of a key head."""
        return range(head * count // self.rule.heads, (head + 1) * count // self.rule.heads)

    def stored(self, head: int, entry: tuple) -> np.ndarray:
        """A key as it is stored."""
        return self.rule.turned(entry[0][head], 0 if self.rule.distance is not None else entry[2])

    def replaced(self, head: int, entry: tuple, key: np.ndarray, value: np.ndarray) -> tuple:
        """The entry with another key, as it is stored, and another value of a head."""
        keys, values = entry[0].copy(), entry[1].copy()
        keys[head] = self.rule.turned(key, 0 if self.rule.distance is not None else -entry[2])
        values[head] = value
        return keys, values, entry[2]

    def share(self, head: int, token: int, queries) -> float:
        """The attention that a token got from these queries, over the heads of a key head."""
        heads = self.group(head, len(self.queries[0]))
        return sum(self.log[i].get((h, token), 0.0) for i in queries for h in heads)

    def take(self, entry: tuple) -> None:
        rule = self.rule
        if len(self.first) < rule.sinks:
            self.first.append(entry)
        else:
            self.recent.append(entry)
            if len(self.recent) > rule.window:
                oldest = self.recent.pop(0)
                for kept in self.kept:
                    kept.append(oldest)
                if rule.coded is not None:
                    for head, kept in enumerate(self.kept):
                        kept[-1] = self.replaced(
                            head, oldest, rule.coded(self.stored(head, oldest)), rule.coded(oldest[1][head])
                        )
        if len(self.log) % rule.every == 0:
            self.choose()

    def choose(self) -> None:
        rule = self.rule
        scores = [np.array(rule.score(self, head, kept), float) for head, kept in enumerate(self.kept)]
        if rule.together:
            scores = [sum(scores) / len(scores)] * len(scores)
        for head, kept in enumerate(self.kept):
            ranked = sorted(range(len(kept)), key=lambda i, s=scores[head], kept=kept: (s[i], kept[i][2]))
            self.kept[head] = sorted((kept[i] for i in ranked[-rule.size :]), key=lambda e: e[2])


class Once(Stream):
    """`StaticEviction` in front of a tier that keeps everything: a block's best are chosen once, and stay for good."""

    def __init__(self, rule: Rule):
        super().__init__(rule)
        self.passed = 0

    def choose(self) -> None:
        old = [kept[: self.passed] for kept in self.kept]
        self.kept = [kept[self.passed :] for kept in self.kept]
        super().choose()
        self.kept = [first + best for first, best in zip(old, self.kept, strict=True)]
        self.passed = len(self.kept[0])


def mass(stream: Stream, head: int, entries: list) -> list[float]:
    """H2O: all that a token got."""
    return [stream.share(head, e[2], range(len(stream.log))) for e in entries]


def mean(stream: Stream, head: int, entries: list) -> list[float]:
    """ZipCache: what a token got from a query that saw it."""
    return [got / (len(stream.log) - e[2]) for got, e in zip(mass(stream, head, entries), entries, strict=True)]


def newest(window: int, kernel: int = 1, pool: str = "mean") -> Callable:
    """TOVA and SnapKV: what the last queries gave, pooled over the neighbours of each token."""

    def score(stream: Stream, head: int, entries: list) -> list[float]:
        last = range(len(stream.log) - window, len(stream.log))
        got = [stream.share(head, e[2], last) for e in entries]
        half = kernel // 2
        around = [got[max(i - half, 0) : i + half + 1] for i in range(len(got))]
        return [sum(near) / kernel if pool == "mean" else max(near) for near in around]

    return score


def above_mean(most: int) -> Callable:
    """Scissorhands: how many queries since the last choice gave more than 1 / n, n tokens being in sight."""

    def score(stream: Stream, head: int, entries: list) -> list[float]:
        now, heads = len(stream.log), stream.group(head, len(stream.queries[0]))
        block = range(now - stream.rule.every, now)
        return [
            sum(stream.log[i].get((h, e[2]), 0.0) > 1 / min(i + 1, most) for i in block for h in heads) for e in entries
        ]

    return score


def short_keys(stream: Stream, head: int, entries: list) -> list[float]:
    """KNorm."""
    return [-math.sqrt(float(e[0][head] @ e[0][head])) for e in entries]


def unlike_the_mean(stream: Stream, head: int, entries: list) -> list[float]:
    """KeyDiff."""
    units = [k / np.linalg.norm(k) for k in (stream.stored(head, e) for e in entries)]
    middle = sum(units, np.zeros(entries[0][0].shape[-1]) if entries else 0.0) / max(len(units), 1)
    return [-float(u @ middle) / float(np.linalg.norm(middle)) for u in units]


def drawn(seed: int) -> Callable:
    """RandomChoice: Murmur3's finaliser of the position, mixed with that of head and seed."""

    def mixed(x: int) -> int:
        for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
            x = ((x ^ (x >> shift)) * factor) % 2**32
        return x ^ (x >> 16)

    def score(stream: Stream, head: int, entries: list) -> list[float]:
        of_head = mixed((head + seed * 0x9E3779B9) % 2**32)
        return [(mixed(e[2] ^ of_head) >> 8) / 2**24 for e in entries]

    return score


def lagged(stream: Stream, head: int, entries: list) -> list[float]:
    """LagKV: at each choice the tokens of the block before the last are ranked by the range of the last block's."""
    now, noted = len(stream.log), stream.noted.setdefault(head, {})
    fresh = [e for e in entries if e[2] not in noted]
    waiting = [e for e in entries if noted.get(e[2]) == math.inf]
    if fresh:
        worth = lag_worth(
            [[np.array([stream.stored(head, e), e[1][head]]) for e in block] for block in (waiting, fresh)]
        )
        order = sorted(range(len(waiting)), key=lambda i: worth[i])
        for place, i in enumerate(order):
            noted[waiting[i][2]] = (place + 1) / len(waiting)
        for e in fresh:
            noted[e[2]] = math.inf
    assert now % stream.rule.every == 0
    return [noted[e[2]] for e in entries]


def lag_worth(blocks: list) -> np.ndarray:
    """What tokens of the first block are worth by the second one's range; a token is its key and its value."""
    mine, following = blocks
    found = np.zeros(len(mine))
    for part in range(2):
        if not mine:
            break
        next_ = np.array([t[part] for t in following])
        low, high = next_.min(axis=0), next_.max(axis=0)
        scaled = (np.array([t[part] for t in mine]) - low) / np.where(high > low, high - low, 1.0)
        spread = scaled.std(axis=1, ddof=1)
        found += np.exp(spread - spread.max()) / np.exp(spread - spread.max()).sum()
    return found


def expected(skip: int, ahead: int) -> Callable:
    """Expected Attention: by the mean and covariance of the queries so far, turned by the mean of rotations to come."""

    def score(stream: Stream, head: int, entries: list) -> list[float]:
        if not entries:
            return []
        rule, total = stream.rule, np.zeros(len(entries))
        now, width = len(stream.log), entries[0][0].shape[-1]
        to_come = [rule.distance] if rule.distance is not None else range(now, now + ahead)
        turn = np.mean([[rule.turned(axis, place) for axis in np.eye(width)] for place in to_come], axis=0).T
        keys = np.array([stream.stored(head, e) for e in entries])
        heads = stream.group(head, len(stream.queries[0]))
        for h in heads:
            queries = np.array([q[h] for q in stream.queries[skip:]]) * rule.scale
            mean, spread = queries.mean(axis=0), np.cov(queries.T, bias=True)
            logits = keys @ (turn @ mean) + 0.5 * np.einsum("sd,de,se->s", keys, turn @ spread @ turn.T, keys)
            weights = np.exp(logits - logits.max())
            total += weights / weights.sum() / len(heads)
        return list(total * [np.linalg.norm(e[1][head]) for e in entries])

    return score


def in_stretches(inner: Callable, size: int, best: int | None = None) -> Callable:
    """ChunkKV and WindowKV: the mean of the best that `inner` says of a stretch of positions."""

    def score(stream: Stream, head: int, entries: list) -> list[float]:
        each, found = inner(stream, head, entries), {}
        for value, e in zip(each, entries, strict=True):
            found.setdefault(e[2] // size, []).append(value)
        return [float(np.mean(sorted(found[e[2] // size])[::-1][:best])) for e in entries]

    return score


def long_beside_neighbours(local: int) -> Callable:
    """CUR: squared lengths by the mean of the neighbours that came with a token since the last choice."""

    def score(stream: Stream, head: int, entries: list) -> list[float]:
        noted = stream.noted.setdefault(head, {})
        fresh, shares = [e for e in entries if e[2] not in noted], {e[2]: 1.0 for e in entries}
        for part in range(2):
            squares = {e[2]: float(e[part][head] @ e[part][head]) for e in fresh}
            for place, square in squares.items():
                shares[place] *= square / np.mean([x for i, x in squares.items() if i // local == place // local])
        noted |= {e[2]: shares[e[2]] for e in fresh}
        return [noted[e[2]] for e in entries]

    return score


def leverage(ridge: float) -> Callable:
    """Leverage: the diagonal of the hat matrix of centred keys, not rotated."""

    def score(stream: Stream, head: int, entries: list) -> list[float]:
        if not entries:
            return []
        x = np.array([e[0][head] for e in entries])
        x = x - x.mean(axis=0)
        gram = x.T @ x
        level = np.trace(gram) / len(gram)
        return list(np.diag(x @ np.linalg.inv(gram + (ridge * level if level else 1.0) * np.eye(len(gram))) @ x.T))

    return score


def weighted(window: int, most: int) -> Callable:
    """Finch: what the last queries gave, each times the tokens that it saw."""

    def score(stream: Stream, head: int, entries: list) -> list[float]:
        last = range(len(stream.log) - window, len(stream.log))
        return [sum(min(i + 1, most) * stream.share(head, e[2], [i]) for i in last) for e in entries]

    return score


def largest(stream: Stream, head: int, entries: list) -> list[float]:
    """KVzip: the largest share that one query of one head gave."""
    heads = stream.group(head, len(stream.queries[0]))
    return [max(given.get((h, e[2]), 0.0) for given in stream.log for h in heads) for e in entries]


def along_queries(stream: Stream, head: int, entries: list) -> list[float]:
    """QFilters: by a singular value decomposition of all queries so far, rotated."""
    units = []
    for h in stream.group(head, len(stream.queries[0])):
        queries = np.array([stream.rule.turned(q[h], i) for i, q in enumerate(stream.queries)])
        first = np.linalg.svd(queries)[2][0]
        units.append(first * np.sign(first @ queries.mean(axis=0)))
    return [float(np.mean(units, axis=0) @ stream.stored(head, e)) for e in entries]


def retained(inward: np.ndarray, outward: np.ndarray) -> Callable:
    """Locret (2410.01805): what a network says of each token's own queries, key and value, none of them rotated."""

    def score(stream: Stream, head: int, entries: list) -> list[float]:
        found = []
        for key, value, place in entries:
            hidden = np.concatenate([x.ravel() for x in (stream.queries[place], key, value)]) @ inward
            found.append(float(hidden / (1 + np.exp(-hidden)) @ outward[:, head]))
        return found

    return score
