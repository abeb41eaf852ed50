"""Tokens that lose join those that stay, in float64 numpy: one key head, one token that leaves at a time.

The lists are those of `scored.py`. Where they are cut, a rule says for each entry that leaves which entry that stays it
joins, what it weighs and what that one weighs; keys come together as they are stored, rotated.
"""

import math
from collections.abc import Callable

import numpy as np

from tests.oracles import scored


class Stream(scored.Stream):
    """`join(stream, head, stays, leaves, worth) -> stays`, entries [(stored key, value, index)] of one head."""

    def __init__(self, rule: scored.Rule, join: Callable, turned: bool = False):
        super().__init__(rule)
        self.join, self.turned = join, turned
        self.memory: dict = {}

    def choose(self) -> None:
        rule = self.rule
        worth = [
            dict(zip((e[2] for e in kept), rule.score(self, h, kept), strict=True)) for h, kept in enumerate(self.kept)
        ]
        if rule.together:
            mean = {i: sum(w[i] for w in worth) / len(worth) for i in worth[0]}
            worth = [mean] * len(worth)
        before = [list(kept) for kept in self.kept]
        super().choose()
        for head, kept in enumerate(self.kept):
            stay = {e[2] for e in kept}
            gone = [e for e in before[head] if e[2] not in stay]

            def plain(entry, head=head):
                return [self.stored(head, entry), entry[1][head].copy(), entry[2]]

            stays, leaves = [plain(e) for e in kept], [plain(e) for e in gone]
            if not stays or not leaves:
                continue
            self.join(self, head, stays, leaves, worth[head])
            for i, (key, value, _) in enumerate(stays):
                if rule.coded is not None:  # what changed is coded again
                    was, worn = self.stored(head, kept[i]), kept[i][1][head]
                    key = key if np.array_equal(key, was) else rule.coded(key)
                    value = value if np.array_equal(value, worn) else rule.coded(value)
                self.kept[head][i] = self.replaced(head, kept[i], key, value)


def averaged(stream: Stream, stays: list, leaves: list, target: dict, weight: dict, own: dict) -> None:
    """Entries come together; what stays changes in place."""
    rule, sums = stream.rule, {}
    for f, s in target.items():
        if weight[f] <= 0:
            continue
        key = leaves[f][0]
        if stream.turned and rule.distance is None:
            key = rule.turned(key, stays[s][2] - leaves[f][2])
        k, v, w = sums.get(s, (own[s] * stays[s][0], own[s] * stays[s][1], own[s]))
        sums[s] = k + weight[f] * key, v + weight[f] * leaves[f][1], w + weight[f]
    for s, (k, v, w) in sums.items():
        stays[s][0], stays[s][1] = k / w, v / w


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


def nearest_above(momentum: float) -> Callable:
    """D2O."""

    def join(stream: Stream, head: int, stays: list, leaves: list, worth: dict) -> None:
        alike = [[cosine(f[0], s[0]) for s in stays] for f in leaves]
        best = [int(np.argmax(row)) for row in alike]
        found = [row[i] for row, i in zip(alike, best, strict=True)]
        mean, before = sum(found) / len(found), stream.memory.get(head)
        threshold = mean if before is None else (1 - momentum) * before + momentum * mean
        stream.memory[head] = threshold
        weight = {f: math.exp(c) if c >= threshold else 0.0 for f, c in enumerate(found)}
        averaged(stream, stays, leaves, dict(enumerate(best)), weight, dict.fromkeys(range(len(stays)), math.e))

    return join


def gaussian(threshold: float) -> Callable:
    """KVMerger."""

    def join(stream: Stream, head: int, stays: list, leaves: list, worth: dict) -> None:
        target, distance = {}, {}
        for f, (key, _, place) in enumerate(leaves):
            older = [s for s in range(len(stays)) if stays[s][2] < place]
            newer = [s for s in range(len(stays)) if stays[s][2] > place]
            near = older[-1:] + newer[:1]
            best = max(near, key=lambda s, key=key: cosine(key, stays[s][0]))
            if cosine(key, stays[best][0]) >= threshold:
                target[f], distance[f] = best, float(np.linalg.norm(key - stays[best][0]))
        weight = {}
        for f, s in target.items():
            together = [distance[g] for g in target if target[g] == s]
            weight[f] = math.exp(-((distance[f] / (sum(together) / len(together))) ** 2))
        averaged(stream, stays, leaves, target, weight, dict.fromkeys(range(len(stays)), 1.0))

    return join


def anchors(stream: Stream, head: int, stays: list, leaves: list, worth: dict) -> None:
    """Elastic Cache."""
    target = {}
    for f, (_, _, place) in enumerate(leaves):
        target[f] = min(range(len(stays)), key=lambda s, place=place: (abs(stays[s][2] - place), stays[s][2]))
    averaged(stream, stays, leaves, target, dict.fromkeys(target, 1.0), dict.fromkeys(range(len(stays)), 1.0))


def zero_class(threshold: float) -> Callable:
    """EMS."""

    def join(stream: Stream, head: int, stays: list, leaves: list, worth: dict) -> None:
        target, weight = {}, {}
        for f, (key, _, place) in enumerate(leaves):
            alike = [cosine(key, s[0]) for s in stays]
            target[f] = int(np.argmax(alike))
            weight[f] = max(worth[place], 0.0) if max(alike) >= threshold else 0.0
        averaged(stream, stays, leaves, target, weight, {s: max(worth[e[2]], 0.0) for s, e in enumerate(stays)})

    return join


def into_following(count: int, seed: int) -> Callable:
    """CaM."""
    draw = scored.drawn(seed)

    def join(stream: Stream, head: int, stays: list, leaves: list, worth: dict) -> None:
        more = [np.zeros_like(s[1]) for s in stays]
        for _, value, place in leaves:
            behind = [s for s in range(len(stays)) if stays[s][2] > place][:count]
            if not behind:
                continue
            mean = sum(max(worth[stays[s][2]], 0.0) for s in behind) / len(behind)
            if mean > 0 and draw(stream, head, [(None, None, place)])[0] < worth[place] / mean:
                for s in behind:
                    more[s] += value / count
        for s, extra in zip(stays, more, strict=True):
            s[1] = s[1] + extra

    return join


def convolved(kernel: np.ndarray, bias: np.ndarray, blend: float) -> Callable:
    """LoCoCo: a kernel [M, 2 D, w] over the M entries that are worth least and all that leave, oldest first."""

    def join(stream: Stream, head: int, stays: list, leaves: list, worth: dict) -> None:
        weak = sorted(sorted(stays, key=lambda e: worth[e[2]])[: len(bias)], key=lambda e: e[2])
        pool = sorted([*weak, *leaves], key=lambda e: e[2])
        x = np.array([np.concatenate(e[:2]) for e in pool])
        padded = np.pad(x, (((kernel.shape[2] - 1) // 2, kernel.shape[2] // 2), (0, 0)))
        fresh = []
        for m, entry in enumerate(weak):
            logits = [
                max(0.0, bias[m] + sum(kernel[m, :, w] @ padded[n + w] for w in range(kernel.shape[2])))
                for n in range(len(pool))
            ]
            share = blend * np.exp(logits) / np.exp(logits).sum()
            share += [(1 - blend) * (e is entry) for e in pool]
            fresh.append(share @ x)
        for entry, new in zip(weak, fresh, strict=True):
            entry[0], entry[1] = new[: len(entry[0])], new[len(entry[0]) :]

    return join
