"""`Sink > Window > Clusters` token by token in float64 numpy: plain lists, one query at a time, one key head at a time.

RetroInfer's rule (2505.02922): what leaves the window gathers in segments; a full segment's keys are clustered by
spherical k-means about their mean; a query attends to the tokens of the best clusters, and to one entry of weight
count * exp(q . mean key) for each of the next ones, whose value is the mean value. Nothing here comes from the library.
"""

import dataclasses
import math

import numpy as np

from tests.oracles.rotation import Turning


@dataclasses.dataclass(frozen=True)
class Rule(Turning):
    """Sizes, and how positions enter."""

    heads: int
    sinks: int
    window: int
    segment: int
    capacity: int
    retrieve: int
    estimate: int
    size: int
    most: int
    iterations: int
    scale: float
    slopes: tuple[float, ...] | None = None
    frequencies: tuple[float, ...] | None = None
    softcap: float | None = None

    def logit(self, h: int, q: np.ndarray, query: int, key: np.ndarray, place: float) -> float:
        """Of a query that is turned and of a key that is turned, or the mean of such keys and of their places."""
        found = self.scale * float(q @ key)
        if self.softcap is not None:
            found = self.softcap * math.tanh(found / self.softcap)
        return found - (0.0 if self.slopes is None else self.slopes[h] * (query - place))


def direction(x: np.ndarray) -> np.ndarray:
    length = math.sqrt(float(x @ x))
    return x / length if length > 0 else x


def k_means(keys: list[np.ndarray], count: int, iterations: int) -> list[int]:
    """The cluster of each key."""
    middle = sum(keys) / len(keys)
    points = [direction(key - middle) for key in keys]
    centroids = [points[i * len(keys) // count] for i in range(count)]

    def nearest(point: np.ndarray) -> int:
        fits = [float(point @ centroid) for centroid in centroids]
        return fits.index(max(fits))

    for _ in range(iterations):
        mine = [nearest(point) for point in points]
        for i in range(count):
            members = [point for point, of in zip(points, mine, strict=True) if of == i]
            if members:
                centroids[i] = direction(sum(members))
    return [nearest(point) for point in points]


class Stream:
    """The lists of one stream; an entry is (key [K, D], value [K, D], index in the stream), keys not rotated."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.first: list = []
        self.recent: list = []
        self.open: list = []
        self.segments: list[list[list[list]]] = []  # of each segment, for each head, clusters: lists of entries

    def read(self, q: np.ndarray, entry: tuple) -> np.ndarray:
        """The output [H, D] of the token `entry`, whose queries are `q`; then it is stored."""
        rule, out = self.rule, np.zeros_like(q)
        turned = [rule.turned(row, entry[2]) for row in q]
        for head in range(rule.heads):
            group = range(head * len(q) // rule.heads, (head + 1) * len(q) // rule.heads)
            clusters = [self.summary(cluster, head) for segment in self.segments for cluster in segment[head]]
            ranked = self.ranked(turned, group, clusters, entry[2])
            best, others = ranked[: rule.retrieve], ranked[rule.retrieve : rule.retrieve + rule.estimate]
            visible = [*self.first, *self.recent, *self.open, entry]
            visible += [e for _, _, _, members in best for e in members]
            for h in group:
                logits, values = [], []
                for key, value, place in visible:
                    logits.append(rule.logit(h, turned[h], entry[2], rule.turned(key[head], place), place))
                    values.append(value[head])
                for key, value, place, members in others:
                    logits.append(rule.logit(h, turned[h], entry[2], key, place) + math.log(len(members)))
                    values.append(value)
                weights = np.exp(np.array(logits) - max(logits))
                out[h] = weights @ np.array(values) / weights.sum()
        self.take(entry)
        return out

    def summary(self, cluster: list, head: int) -> tuple:
        """Mean key, mean value, mean place, and the tokens."""
        keys = [self.rule.turned(key[head], place) for key, _, place in cluster]
        n = len(cluster)
        return sum(keys) / n, sum(v[head] for _, v, _ in cluster) / n, sum(p for _, _, p in cluster) / n, cluster

    def ranked(self, q: list, group: range, clusters: list, place: int) -> list:
        """Best first: by the sum over query heads of exp(logit) / sum over clusters of exp(logit)."""
        wanted = np.zeros(len(clusters))
        for h in group:
            weights = np.exp([self.rule.logit(h, q[h], place, key, p) for key, _, p, _ in clusters])
            wanted += weights / weights.sum()
        return [clusters[i] for i in np.argsort(-wanted, kind="stable")]

    def take(self, entry: tuple) -> None:
        """To the sinks, else into the window, whose oldest token goes to the open segment."""
        if len(self.first) < self.rule.sinks:
            self.first.append(entry)
            return
        self.recent.append(entry)
        if len(self.recent) <= self.rule.window:
            return
        self.open.append(self.recent.pop(0))
        if len(self.open) == self.rule.segment:
            self.segments.append([self.clustered(head) for head in range(self.rule.heads)])
            self.segments = self.segments[-(self.rule.capacity // self.rule.segment) :]
            self.open = []

    def clustered(self, head: int) -> list[list]:
        """The open segment's clusters, none of more than `most` tokens."""
        rule = self.rule
        keys = [rule.turned(key[head], place) for key, _, place in self.open]
        count = -(-rule.segment // rule.size)
        mine, found = k_means(keys, count, rule.iterations), []
        for i in range(count):
            members = [e for e, of in zip(self.open, mine, strict=True) if of == i]
            found += [members[j : j + rule.most] for j in range(0, len(members), rule.most)]
        return found
