"""A radix tree over token ids whose nodes hold states: what many requests begin with is read once.

A node is where a prompt ended or where two of them part, so its state is one that another request can go on from; those
are the states that are worth keeping (Marconi, 2411.19379). States are of streams and not of tokens: a window or a
recurrent layer cannot be cut back, so a request goes on from a node at or before the place where it parts.

A session that goes on leaves a state at the end of each turn, and only its newest one is of use, unless somebody goes
another way from an older one. So states that are passed go first: those from which one way goes on, on which another
state stands. Marconi weighs them like others. On drawn traces up to 1.5 times as many tokens are found again without,
and a tenth fewer where there are half as many states as sessions of agents (benchmarks/serving/prefixes/policies.py).

All places are multiples of the chunk in which prompts are read. A request that goes on from a node then reads the same
chunks as one that reads everything, and computes the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

Ids = Sequence[int] | Int32[np.ndarray, " _"]


@runtime_checkable
class Kept(Protocol):
    """A state that streams can go on from."""

    @property
    def nbytes(self) -> int:
        """What counts of it against the budget."""
        ...


@dataclasses.dataclass(eq=False)
class Node:
    """A place in the tree: `edge` are the ids from the parent's place to this one; `depth` ids lie before it."""

    edge: Int32[np.ndarray, " T"]
    depth: int
    parent: Node | None
    children: dict[bytes, Node] = dataclasses.field(default_factory=dict)
    state: Kept | None = None
    used: int = 0  # the tree's clock, when its state was last read or kept
    noted: int = 0  # and when a prompt last went here

    def chain(self) -> Iterator[Node]:
        """This node and those before it, up to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


class PrefixTree:
    """States at the beginnings of prompts, within a budget of bytes.

    Beyond the budget the state goes whose utility is least: how recently it was used, in [0, 1], plus `alpha` times the
    work that it saves per byte, in [0, 1] of the best. The work is that of reading from the nearest state before it. A
    state that is passed has the utility 0, and is no state before another one.

    Args:
      chunk_size: of the chunks in which prompts are read.
      budget: bytes of states that are kept.
      work: what reading tokens [start, stop) of a prompt costs, in any unit.
      alpha: how much work counts beside recency.
      passed_first: whether states that are passed go first.
      most_tokens: ids that are remembered; beyond them the paths go whose last use is longest ago.
      dropped: is called with each state that goes, or that finds no place.
    """

    def __init__(
        self,
        chunk_size: int,
        budget: int,
        work: Callable[[int, int], float] = lambda start, stop: stop - start,
        alpha: float = 2.0,
        passed_first: bool = True,
        most_tokens: int = 1 << 22,
        dropped: Callable[[Any], None] = lambda state: None,
    ):
        self.chunk_size, self.budget, self.alpha, self.passed_first = chunk_size, budget, alpha, passed_first
        self._dropped = dropped
        self._work, self._most_tokens = work, most_tokens
        self._root = Node(np.zeros(0, np.int32), 0, None)
        self._held: set[Node] = set()  # those with states, which are few of all
        self._clock = 0
        self.nbytes = 0
        self.tokens = 0

    def add(self, prompt: Ids) -> None:
        """Note a prompt that will be read: its end, and where it parts from others, become places for states."""
        ids = self._whole_chunks(prompt)
        self._clock += 1
        node = self._root
        while node.depth < len(ids):
            rest = ids[node.depth :]
            child = node.children.get(self._key(rest))
            if child is None:
                child = Node(rest, len(ids), node)
                node.children[self._key(rest)] = child
                self.tokens += len(rest)
            elif (same := self._common(child.edge, rest)) < len(child.edge):
                child = self._split(child, same)
            child.noted = self._clock
            node = child
        self._forget_paths()

    def match(self, prompt: Ids) -> tuple[int, Kept | None]:
        """The deepest state that stands in a prompt: how many ids it has read, and itself; 0 and None without one."""
        self._clock += 1
        best = None
        for node in self._path(self._whole_chunks(prompt)):
            if node.state is not None:
                best = node
        if best is None:
            return 0, None
        best.used = self._clock
        return best.depth, best.state

    def wants(self, prompt: Ids, depth: int) -> bool:
        """Whether a state behind the first `depth` ids of a prompt has a place, and none is there."""
        if not self.budget or depth == 0 or depth % self.chunk_size:
            return False
        ids = self._whole_chunks(prompt[:depth])
        node = next((node for node in self._path(ids) if node.depth == depth), None)
        return node is not None and node.state is None

    def keep(self, prompt: Ids, depth: int, state: Kept) -> None:
        """Give a state behind the first `depth` ids of a prompt its place; others go where the budget is exceeded."""
        ids = self._whole_chunks(prompt[:depth])
        node = next((node for node in self._path(ids) if node.depth == depth), None)
        if node is None or node.state is not None or state.nbytes > self.budget:
            self._dropped(state)
            return
        self._clock += 1
        node.state, node.used = state, self._clock
        self._held.add(node)
        self.nbytes += state.nbytes
        while self.nbytes > self.budget:
            utilities = self.utilities()
            self._drop(min(utilities, key=utilities.__getitem__))

    def drop_least(self, useful: Callable[[Any], bool]) -> bool:
        """Give up the state whose utility is least among those that are `useful` to give up; whether there was one."""
        found = {node: utility for node, utility in self.utilities().items() if useful(node.state)}
        if found:
            self._drop(min(found, key=found.__getitem__))
        return bool(found)

    def clear(self) -> None:
        """Give up all states."""
        for node in self.holding():
            self._drop(node)

    def holding(self) -> list[Node]:
        """The nodes that hold states, those longest unused first."""
        return sorted(self._held, key=lambda node: node.used)

    def utilities(self) -> dict[Node, float]:
        """What each state is worth, as `holding` has them: recency plus work saved per byte; 0 where it is passed."""
        holding = self.holding()
        passed = {node for node in holding if self._passed(node)}
        recency = {node: (i + 1) / len(holding) for i, node in enumerate(holding)}
        saved = {
            node: self._saved(node, passed) / max(node.state.nbytes, 1) for node in holding if node.state is not None
        }
        most = max(saved.values(), default=0.0) or 1.0
        return {node: 0.0 if node in passed else recency[node] + self.alpha * saved[node] / most for node in holding}

    def _passed(self, node: Node) -> bool:
        """Whether one way goes on from a node, and a state stands on it before it parts."""
        while self.passed_first and len(node.children) == 1:
            (node,) = node.children.values()
            if node.state is not None:
                return True
        return False

    def _saved(self, node: Node, passed: set[Node]) -> float:
        before = (n.depth for n in list(node.chain())[1:] if n.state is not None and n not in passed)
        return self._work(next(before, 0), node.depth)

    def _drop(self, node: Node) -> None:
        state, node.state = node.state, None
        assert state is not None
        self._held.remove(node)
        self.nbytes -= state.nbytes
        self._dropped(state)

    def _split(self, child: Node, length: int) -> Node:
        """A new node `length` ids along a child's edge."""
        parent = child.parent
        assert parent is not None
        middle = Node(child.edge[:length], parent.depth + length, parent)
        parent.children[self._key(middle.edge)] = middle
        child.edge, child.parent = child.edge[length:], middle
        middle.children[self._key(child.edge)] = child
        return middle

    def _forget_paths(self) -> None:
        while self.tokens > self._most_tokens:
            leaves = [node for node in self._nodes() if not node.children and node.noted != self._clock]
            if not leaves:
                return
            oldest = min(leaves, key=lambda node: node.noted)
            if oldest.state is not None:
                self._drop(oldest)
            assert oldest.parent is not None
            del oldest.parent.children[self._key(oldest.edge)]
            self.tokens -= len(oldest.edge)

    def _path(self, ids: Int32[np.ndarray, " T"]) -> Iterator[Node]:
        """The nodes along these ids, the root left out."""
        node = self._root
        while node.depth < len(ids):
            rest = ids[node.depth :]
            child = node.children.get(self._key(rest))
            if child is None or len(child.edge) > len(rest) or not np.array_equal(child.edge, rest[: len(child.edge)]):
                return
            yield child
            node = child

    def _nodes(self) -> Iterator[Node]:
        """All nodes but the root."""
        waiting = list(self._root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def _common(self, a: Int32[np.ndarray, " T"], b: Int32[np.ndarray, " U"]) -> int:
        """How many ids two runs begin with together, in whole chunks."""
        length = min(len(a), len(b))
        differ = np.flatnonzero(a[:length] != b[:length])
        same = int(differ[0]) if differ.size else length
        return same - same % self.chunk_size

    def _key(self, ids: Int32[np.ndarray, " T"]) -> bytes:
        return ids[: self.chunk_size].tobytes()

    def _whole_chunks(self, prompt: Ids) -> Int32[np.ndarray, " T"]:
        return np.asarray(prompt[: len(prompt) - len(prompt) % self.chunk_size], np.int32)
