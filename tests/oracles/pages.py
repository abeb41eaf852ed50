"""`Sink > Window > Pages` token by token in float64 numpy: plain lists, one query at a time, one key head at a time.

Quest's rule (2406.10774, algorithm 1) with LServe's logical pages (2502.14866, section 3.5): a page's score is the sum
over channels of max(q * smallest, q * largest key value), the best of its logical pages; with several query heads a key
head, the best of them. The `top_k` best pages are attended. Nothing here comes from the library.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Paged:
    """The lists of one stream: `entries` are (key [K, D], value [K, D], index in the stream)."""

    heads: int
    sinks: int
    window: int
    size: int
    capacity: int
    top_k: int
    score: object  # (keys [n, D], q [D]) -> float
    page_of: dict = dataclasses.field(default_factory=dict)
    first: list = dataclasses.field(default_factory=list)
    recent: list = dataclasses.field(default_factory=list)
    paged: list = dataclasses.field(default_factory=list)
    summarised: dict = dataclasses.field(default_factory=dict)
    seen_by_pages: int = 0

    def visible(self, q: np.ndarray, scale: float, slopes=None, place: int = 0) -> list[list]:
        """What a query [H, D] sees, for each key head: the sinks, the window, and the tokens of its best pages."""
        pages: dict[int, list] = {}
        for entry in self.paged:
            pages.setdefault(self.page_of[entry[2]], []).append(entry)
        found = []
        for head in range(self.heads):
            group = range(head * len(q) // self.heads, (head + 1) * len(q) // self.heads)

            def value(page, head=head, group=group):
                whole = self.summarised[page]
                near = place - pages[page][-1][2]
                bias = (lambda g: 0.0) if slopes is None else (lambda g: slopes[g] * near)
                keys = [key[head] for key in whole]
                return max(scale * self.score(np.array(keys), q[g]) - bias(g) for g in group)

            best = sorted(pages, key=value, reverse=True)[: self.top_k]
            found.append([*self.first, *self.recent, *(entry for page in sorted(best) for entry in pages[page])])
        return found

    def take(self, entry) -> None:
        """A token after its query: to the sinks, else into the window, whose oldest token goes to the pages."""
        if len(self.first) < self.sinks:
            self.first.append(entry)
            return
        self.recent.append(entry)
        if len(self.recent) <= self.window:
            return
        falling = self.recent.pop(0)
        page = self.seen_by_pages // self.size
        self.seen_by_pages += 1
        self.page_of[falling[2]] = page
        self.paged.append(falling)
        # The summary is of all tokens that the page ever held: it outlives those that had to go.
        self.summarised.setdefault(page, []).append(falling[0])
        if len(self.paged) > self.capacity:
            self.paged.pop(0)


def bounds(parts: int, size: int):
    """max over logical pages of sum over channels of max(q * low, q * high)."""

    def score(keys: np.ndarray, q: np.ndarray) -> float:
        width = size // parts
        pieces = [keys[i : i + width] for i in range(0, len(keys), width)]
        return max(np.maximum(q * piece.min(axis=0), q * piece.max(axis=0)).sum() for piece in pieces)

    return score


def means(power: float):
    """The mean key, times the number of keys to a power."""

    def score(keys: np.ndarray, q: np.ndarray) -> float:
        return float(q @ keys.mean(axis=0)) * len(keys) ** power

    return score


def attention(q: np.ndarray, visible: list[list], scale: float, slopes=None, place: int = 0) -> np.ndarray:
    """Softmax attention of one query [H, D] over what each of its key heads sees."""
    out = np.zeros_like(q)
    for h in range(len(q)):
        head = h * len(visible) // len(q)
        keys = np.array([entry[0][head] for entry in visible[head]])
        values = np.array([entry[1][head] for entry in visible[head]])
        logits = scale * keys @ q[h]
        if slopes is not None:
            logits -= slopes[h] * np.array([place - entry[2] for entry in visible[head]])
        weights = np.exp(logits - logits.max())
        out[h] = weights @ values / weights.sum()
    return out
