"""`Sink > Window > ContentPages` token by token in float64 numpy: a page is a list, and the pages are a list of lists.

Positions, scores and attention are those of `oracles.pages`; where a page ends is said here, one token at a time. By
keys: the cosine of the new token's key, before rotation and of all heads, with the mean of the page's last `context`
keys (DHSA's boundaries, 2510.24606, without training). By ids: the page's last token ends a sentence (SentenceKV,
2504.00970). Nothing here comes from the library.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from tests.oracles import pages


@dataclasses.dataclass(frozen=True)
class Rule(pages.Rule):
    """`ends(page, entry)`: whether the page, a list of entries, ends before the entry. `capacity` counts slots."""

    least: int = 1
    ends: Callable[[list, tuple], bool] = lambda page, entry: False


class Stream(pages.Stream):
    """An entry is (key [K, D], value [K, D], index in the stream), keys not rotated."""

    def __init__(self, rule: Rule):
        super().__init__(rule)
        self.pages: list[list] = []
        self.started = 0

    def take(self, entry: tuple) -> None:
        """To the sinks, else into the window, whose oldest token goes to the pages, of which the oldest goes whole."""
        if len(self.first) < self.rule.sinks:
            self.first.append(entry)
            return
        self.recent.append(entry)
        if len(self.recent) <= self.rule.window:
            return
        falling = self.recent.pop(0)
        if not self.pages or self.closed(self.pages[-1], falling):
            self.pages.append([])
            self.started += 1
        self.pages[-1].append(falling)
        self.pages = self.pages[-(self.rule.capacity // self.rule.size) :]
        self.page_of[falling[2]] = self.started
        self.summarised.setdefault(self.started, []).append((falling[0], falling[2]))
        self.paged = [held for page in self.pages for held in page]

    def closed(self, page: list, entry: tuple) -> bool:
        if len(page) == self.rule.size:
            return True
        return len(page) >= self.rule.least and self.rule.ends(page, entry)

    def lengths(self) -> list[int]:
        """Tokens in each page, oldest first."""
        return [len(page) for page in self.pages]


def key_change(threshold: float, context: int):
    """A page ends where the new key's cosine with the mean of the page's last `context` keys is below `threshold`."""

    def ends(page: list, entry: tuple) -> bool:
        mean, key = np.mean([held[0].ravel() for held in page[-context:]], axis=0), entry[0].ravel()
        return float(mean @ key) < threshold * np.linalg.norm(mean) * np.linalg.norm(key)

    return ends


def end_tokens(ids: np.ndarray, last: tuple[int, ...]):
    """A page ends behind a token whose id is one of `last`; `ids` are those of the stream."""

    def ends(page: list, entry: tuple) -> bool:
        return int(ids[page[-1][2]]) in last

    return ends
