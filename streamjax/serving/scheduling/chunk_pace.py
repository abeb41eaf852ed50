"""How much of prompts an iteration reads beside rows that decode, so that these wait no longer than they may.

The adaptive chunks of Mnemosyne (2409.17264): behind a long context a token takes longer, so fewer are read at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

LEARNING = 0.2  # of a new figure, in the means


class ChunkPace:
    """Learns what iterations take, and says how many tokens the next one may read.

    An iteration takes what decoding takes, and as long as the reading is work. Both are running means of what was
    measured. Before anything was, few tokens are read.

    Args:
      seconds: that an iteration may take while rows decode.
      least: tokens that it reads at least, so that prompts are read at all.
      most: at most, and while no row decodes.

    Example:
      >>> pace = ChunkPace(seconds=0.1, least=16, most=256)
      >>> pace.ran(0.02)  # rows decoded alone
      >>> pace.ran(0.04, work=16.0)
      >>> pace.begin(decoding=True)
      >>> pace.tokens(work=lambda count: 1.0 * count)  # 0.02 s and 64 times 0.00125 s
      64
    """

    def __init__(self, seconds: float, least: int, most: int):
        self.seconds, self.least, self.most = seconds, min(least, most), most
        self._decoding: float | None = None
        self._rate: float | None = None  # seconds of a unit of work
        self._left, self._first = 0.0, True

    def begin(self, decoding: bool) -> None:
        """An iteration begins, in which rows decode or not."""
        self._left = self.seconds - (self._decoding or 0.0) if decoding else float("inf")
        self._first = True

    def tokens(self, work: Callable[[int], float]) -> int:
        """How many tokens of a prompt to read now; `work(count)` is what so many are. 0: no more in this iteration."""
        first, self._first = self._first, False
        sizes = list(self._sizes())
        if self._left == float("inf"):
            found = self.most
        elif self._rate is None:
            found = self.least if first else 0
        else:
            rate, left = self._rate, self._left
            fitting = [size for size in sizes if rate * work(size) <= left]
            found = max(fitting, default=self.least if first else 0)
        self._left -= (self._rate or 0.0) * work(found)
        return found

    def ran(self, seconds: float, work: float = 0.0) -> None:
        """An iteration in which rows decoded is over; `work`: of what it read."""
        if not work:
            self._decoding = _mean(self._decoding, seconds)
        elif self._decoding is not None:
            self._rate = _mean(self._rate, max(seconds - self._decoding, 0.0) / work)

    def _sizes(self) -> Iterator[int]:
        size = self.least
        while size < self.most:
            yield size
            size *= 2
        yield self.most


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + LEARNING * (new - old)
