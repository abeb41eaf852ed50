"""The loop of speculative decoding: guess, verify, go on; each stream of a batch at its own pace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from streamjax.models.decoder import Decoder
from streamjax.models.nonfinite import not_finite
from streamjax.parallel.multiprocess import on_host
from streamjax.streaming.decode_block import decode_block
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.speculative.drafter import Drafter, Drafts, Draws, ways_of_tree
from streamjax.streaming.speculative.history import History
from streamjax.streaming.speculative.pace import Pace
from streamjax.streaming.speculative.tree_verification import verify_tree_pass
from streamjax.streaming.speculative.two_phases import NO_TREES, takes_trees
from streamjax.streaming.speculative.verification import Verified, choose_first, verify_pass
from streamjax.streaming.state import StreamState

# Of tokens that a stream may read next, how many it is to read at most: where its text ends, nothing behind that.
Limit = Callable[[Sequence[int]], int]
WORTH_A_LOOP = 4  # tokens


class Rounds:
    """Streams that are continued round by round.

    Attributes:
      state: where the streams stand: they have read what `go` has returned. certain: the token that each reads next.
      passes, guessed, right: passes of the model, tokens that were guessed, and those of them that were right.

    Args:
      model, state: the model and its streams. The state is donated.
      drafter: who guesses; None: nobody.
      streams: what each stream has read, as far as it is known; it goes on with them.
      sampler, key: how tokens are chosen.
      index: the number of each stream's next draw.
      stop: ids behind which a stream reads nothing more.
      limit: see `Limit`; for a single stream.
      block: tokens that may be read without a look at the host, while nobody guesses.

    Raises:
      ValueError: the drafter has prompt tokens that the model, or a cache, cannot read.
    """

    def __init__(
        self,
        model: Decoder,
        state: StreamState,
        drafter: Drafter | None,
        streams: Sequence[History],
        *,
        sampler: Sampler,
        key: Array | None,
        index: Int[np.ndarray, " B"],
        stop: tuple[int, ...] = (),
        limit: Limit | None = None,
        block: int = 1,
    ):
        if drafter is not None and drafter.prompts is not None and not takes_trees(model, state.caches):
            raise ValueError(NO_TREES)
        self.state = state
        self.passes = self.guessed = self.right = 0
        self._model, self._drafter, self._streams = model, drafter, streams
        self._sampler, self._key, self._stop, self._limit, self._block = sampler, key, stop, limit, block
        self._index = np.asarray(index, np.int64)
        self._ahead: Array | None = None  # what the drafter's prompt tokens say behind where the streams stand
        certain, failed = choose_first(model, state, key, self._draws().index, sampler)
        self.certain, self._failed = (np.array(x) for x in on_host((certain, failed)))
        self._pace = Pace(len(streams), 1 if drafter is None else drafter.pass_width)

    def _draws(self) -> Draws:
        index = (self._index % 2**32).astype(np.uint32).astype(np.int32)
        return Draws(self._sampler, self._key, index, self.state.hidden, self._ahead)

    def go(self, most: Int[np.ndarray, " B"]) -> list[list[int]]:
        """One pass; returns what each stream has read. A stream reads at most `most` tokens; with 0 it stands still.

        Raises:
          ValueError: the logits of one that is to go on are not finite (`NotFiniteError`); nothing has been read then.
        """
        goes = most > 0
        if (goes & self._failed).any():
            row = int(np.argmax(goes & self._failed))
            raise not_finite(self._model, self._streams[row].tokens)
        if (ahead := self._single_tokens_ahead(goes, most)) >= WORTH_A_LOOP:
            return self._go_without_guesses(goes, ahead)
        for row in np.flatnonzero(goes).tolist():
            self._streams[row].extend([int(self.certain[row])])
        self._index += 1  # the draw behind the certain token
        wanted = goes & (most > 1) & self._pace.wants
        drafts = self._drafts(wanted)
        tokens = np.concatenate((self.certain[:, None], drafts.tokens), axis=1).astype(np.int32)
        prompts = None if self._drafter is None or not wanted.any() else self._drafter.prompts
        if drafts.parents is None or (prompts is None and not drafts.count.any()):
            done, guesses = self._read_one_way(tokens, drafts.count, goes, most)
        else:
            done, guesses = self._read_tree(tokens, drafts.parents, drafts.count, goes, most, prompts)
        self.state, self._ahead = done.state, done.ahead
        tokens, count, following, failed = on_host((done.tokens, done.count, done.following, done.failed))
        self._index += np.where(goes, count - 1, -1)
        self.certain = np.where(goes, following, self.certain)
        self._failed = np.where(goes, failed, self._failed)
        tried = guesses if prompts is None else np.where(goes, np.maximum(guesses, 1), 0)  # what was paid for
        self._pace.note(tried, np.maximum(count - 1, 0))
        self.passes += 1
        self.guessed += int(guesses.sum())
        self.right += int(np.maximum(count - 1, 0).sum())
        read = [row[:n].tolist() for row, n in zip(tokens, count, strict=True)]
        for stream, new in zip(self._streams, read, strict=True):
            stream.extend(new[1:])
        return read

    def _read_one_way(
        self, tokens: Int[np.ndarray, "B C"], count: Int[np.ndarray, " B"], goes: np.ndarray, most: np.ndarray
    ) -> tuple[Verified, Int[np.ndarray, " B"]]:
        """A pass over the certain tokens and the guesses behind them; how many guesses those were."""
        given = np.where(goes, 1 + np.minimum(count, np.maximum(most - 1, 0)), 0)
        if self._limit is not None and goes[0]:
            given[0] = self._limit(tokens[0, : given[0]].tolist())
        if given.max() <= 1:
            tokens = tokens[:, :1]
        done = verify_pass(
            self._model, self.state, jnp.asarray(tokens), jnp.asarray(given, jnp.int32), self._key,
            jnp.asarray(self._draws().index), self._sampler, self._stop,
        )  # fmt: skip
        return done, np.maximum(given - 1, 0)

    def _read_tree(
        self,
        tokens: Int[np.ndarray, "B N"],
        parents: Int[np.ndarray, "B K"],
        count: Int[np.ndarray, " B"],
        goes: np.ndarray,
        most: np.ndarray,
        prompts: Array | None,
    ) -> tuple[Verified, Int[np.ndarray, " B"]]:
        """The same with trees of guesses, whose roots are the certain tokens."""
        assert self._drafter is not None
        parents = np.pad(parents, ((0, 0), (1, 0)))
        ways = ways_of_tree(parents)
        given = goes[:, None] & (np.arange(tokens.shape[1]) <= count[:, None])
        given &= np.array([[len(way) for way in row] for row in ways]) <= most[:, None]
        if self._limit is not None and goes[0]:
            for node, way in enumerate(ways[0]):
                given[0, node] &= self._limit(tokens[0, way].tolist()) == len(way)
        done = verify_tree_pass(
            self._model, self.state, jnp.asarray(tokens), jnp.asarray(parents, jnp.int32), jnp.asarray(given),
            self._key, jnp.asarray(self._draws().index), 1 + self._drafter.length, self._sampler, self._stop,
            prompts,
        )  # fmt: skip
        return done, given[:, 1:].sum(axis=1)

    def _single_tokens_ahead(self, goes: np.ndarray, most: Int[np.ndarray, " B"]) -> int:
        """How many tokens all streams that go on read one by one before anybody guesses."""
        if self._limit is not None or not goes.any() or np.unique(self._index[goes]).size > 1:
            return 0
        return int(min(self._block, self._pace.pause[goes].min(), most[goes].min()))

    def _go_without_guesses(self, goes: np.ndarray, count: int) -> list[list[int]]:
        """So many tokens in the loop of plain decoding, which draws the certain token first, once more."""
        first = jnp.asarray(self._draws().index)[int(np.argmax(goes))]
        self.state, _, out, _ = decode_block(
            self._model, self.state, jnp.asarray(~goes), self._key, first, jnp.int32(count), self._sampler, self._stop,
            self._block,
        )  # fmt: skip
        self._ahead = None
        read = [[int(token) for token in row if token >= 0] for row in np.asarray(out)]
        counts = np.array([len(new) for new in read])
        self._index += counts
        following, failed = choose_first(self._model, self.state, self._key, self._draws().index, self._sampler)
        self.certain = np.where(goes, following, self.certain)
        self._failed = np.where(goes, failed, self._failed)
        self._pace.note(np.zeros_like(counts), np.maximum(counts - 1, 0))
        self.passes += int(counts.max())
        for stream, new in zip(self._streams, read, strict=True):
            stream.extend(new)
        return read

    def _drafts(self, wanted: np.ndarray) -> Drafts:
        if self._drafter is None or not wanted.any():
            width = 0 if self._drafter is None else self._drafter.nodes
            rows = len(self._streams)
            return Drafts(np.zeros((rows, width), np.int32), np.zeros(rows, np.int32))
        drafts = self._drafter.propose(self._streams, wanted.tolist(), self._draws())
        if not takes_trees(self._model, self.state.caches):
            drafts = drafts.first_ways(self._drafter.length)
        known = (drafts.tokens >= 0) & (drafts.tokens < self._model.config.vocab_size)  # others would make NaN
        count = np.minimum(drafts.count, np.cumprod(known, axis=1).sum(axis=1))
        return Drafts(drafts.tokens, count.astype(np.int32), drafts.parents)


def speculate(
    rounds: Rounds, max_new_tokens: int, stop: tuple[int, ...], block: int
) -> Iterator[tuple[StreamState, np.ndarray]]:
    """Go on until every stream has read `max_new_tokens`, or has ended with one of `stop`.

    Yields the state, and the new tokens [B, n] in front of -1, whenever a stream has `block` of them.
    """
    left = np.full(rounds.state.batch_size, max_new_tokens, np.int64)
    waiting: list[list[int]] = [[] for _ in left]

    def take() -> np.ndarray:
        out = np.full((len(waiting), max(map(len, waiting))), -1, np.int32)
        for row, tokens in enumerate(waiting):
            out[row, : len(tokens)] = tokens
            tokens.clear()
        return out

    while left.any():
        try:
            read = rounds.go(left)
        except ValueError:
            if any(waiting):
                yield rounds.state, take()
            raise
        for row, new in enumerate(read):
            waiting[row].extend(new)
            left[row] = 0 if new and new[-1] in stop else left[row] - len(new)
        if max(map(len, waiting)) >= block or not left.any():
            yield rounds.state, take()
