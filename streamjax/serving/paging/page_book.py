"""Who has which page of a pool, and what of that rows have in common."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from streamjax.kv.pages.page_pool import PageTables


class PageBook:
    """P pages, each of which is free or has one holder or more: streams, and states at the beginnings of prompts.

    A page with several holders is full, so that nobody writes it: those who go on from it take pages of their own.
    """

    def __init__(self, pages: int):
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._holders: collections.Counter[int] = collections.Counter()

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """So many pages for a new holder; None, and nothing is taken, where there are fewer."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        self._holders.update(taken)
        return taken

    def share(self, pages: Iterable[int]) -> list[int]:
        """The same pages for one more holder."""
        pages = list(pages)
        self._holders.update(pages)
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """A holder has no use for its pages; those that have no other holder are free."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._free.append(page)

    def only_holder(self, pages: Iterable[int]) -> bool:
        """Whether any of these pages would be free if one of its holders gave it back."""
        return any(self._holders[page] == 1 for page in pages)


def tables_of(rows: Sequence[Sequence[int]], width: int, share: bool = True) -> PageTables:
    """Tables of rows with these pages: at most `width` a row, and as many that are listed as shared.

    Pages are shared from the first one on, so they make a tree; those nearest its root are listed first.
    """
    own = np.full((len(rows), width), -1, np.int32)
    for row, pages in enumerate(rows):
        own[row, : len(pages)] = pages
    most = width if share and len(rows) > 1 else 0
    shared, place = np.full(most, -1, np.int32), np.zeros(most, np.int32)
    sharers, begins = np.zeros((most, len(rows)), bool), np.zeros(len(rows), np.int32)
    together = collections.deque([(0, list(range(len(rows))))])
    listed = 0
    while together and listed < most:
        depth, group = together.popleft()
        by_page: dict[int, list[int]] = {}
        for row in group:
            if depth < len(rows[row]):
                by_page.setdefault(rows[row][depth], []).append(row)
        for page, some in by_page.items():
            if len(some) < 2 or listed == most:
                continue
            shared[listed], place[listed], sharers[listed, some], begins[some] = page, depth, True, depth + 1
            listed += 1
            together.append((depth + 1, some))
    return PageTables(*(jnp.array(x, copy=True) for x in (own, shared, place, sharers, begins)))
