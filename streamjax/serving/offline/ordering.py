"""An order for requests that are all known: what they begin with is read once, and reading and decoding go together.

Requests with a common beginning stand together, longer ones in it again (BatchLLM, 2412.03594): then a prefix is read
once, whatever memory there is for prefixes. An engine's step reads a chunk of prompts beside a token of every row, so
groups that mostly read and groups that mostly write are taken from both ends at once (BlendServe, 2411.16102): else the
end of a job would be rows without prompts, and its beginning prompts without rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class _Group:
    """Requests with a common beginning, in the order in which they are read. read, write: steps that they take."""

    members: list[int] = dataclasses.field(default_factory=list)
    read: float = 0.0
    write: float = 0.0

    @property
    def writing(self) -> float:
        """Its share of decoding."""
        return self.write / max(self.read + self.write, 1e-9)


def order_requests(
    prompts: Sequence[tuple[int, ...]], new_tokens: Sequence[int], chunk_size: int, rows: int
) -> list[int]:
    """Indices of requests in the order in which an engine should take them.

    Args:
      prompts: ids of each.
      new_tokens: that each may draw.
      chunk_size, rows: of the engine: it reads so many tokens in a step, and draws as many as it has rows.

    Example:
      >>> order_requests([(1, 2, 3), (7, 8, 9), (1, 2, 4)], [1, 1, 1], chunk_size=2, rows=2)
      [1, 0, 2]
    """
    groups: list[_Group] = []
    before: tuple[int, ...] = ()
    for index in sorted(range(len(prompts)), key=prompts.__getitem__):  # the tree of prefixes, depth first
        same = _common(before, prompts[index]) // chunk_size * chunk_size
        if not same:
            groups.append(_Group())
        groups[-1].members.append(index)
        groups[-1].read += (len(prompts[index]) - same) / chunk_size
        groups[-1].write += new_tokens[index] / rows
        before = prompts[index]
    return _blended(sorted(groups, key=lambda group: group.writing))


def _blended(groups: Sequence[_Group]) -> list[int]:
    """Requests from the groups at both ends, so that reading and writing go on side by side to the end."""
    read, write = sum(group.read for group in groups), sum(group.write for group in groups)
    order: list[int] = []
    low, high, done = 0, len(groups) - 1, _Group()
    used = [0] * len(groups)
    while low <= high:
        behind = done.write * read < done.read * write  # less has been written than read, as shares of the whole
        at = high if behind else low
        group = groups[at]
        order.append(group.members[used[at]])
        used[at] += 1
        done.read += group.read / len(group.members)
        done.write += group.write / len(group.members)
        while low <= high and used[low] == len(groups[low].members):
            low += 1
        while low <= high and used[high] == len(groups[high].members):
            high -= 1
    return order


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many ids two prompts begin with together."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
