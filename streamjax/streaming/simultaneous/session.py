"""A session that reads and answers at once: text in, text out, and either may come next (2505.16983)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from streamjax.checkpoints import read_about, restore_pytree, save_pytree
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.field_checks import described
from streamjax.kv.cache import Cache
from streamjax.models.decoder import Decoder
from streamjax.streaming.generate import stop_ids
from streamjax.streaming.interrupts import undisturbed
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.saving.fingerprints import fingerprint
from streamjax.streaming.simultaneous.groups import init_groups, read_group
from streamjax.streaming.simultaneous.waiting import generate_while_reading
from streamjax.streaming.text_output import TextOutput

_KIND = "simultaneous"


class SimultaneousSession:
    """One stream of two groups: a source that is read, and an answer that is written meanwhile.

        session = SimultaneousSession(model, tokenizer, sj.kv.preset("dense", capacity=4096))
        session.read("Guten Morgen,")
        print("".join(session.write(2)))                     # of what was read so far
        for text in session.answer(pieces_that_come, wait=3):  # reads three tokens, then writes and reads in turns
            print(text, end="")

    Attributes:
      state: the groups. sampler: how tokens are chosen; may be replaced. stopped: whether the answer has ended.

    Args:
      model, tokenizer: which belong together.
      source, output: caches, as in `init_groups`.
      begin: the text or the ids that the answer begins with, such as what a template puts before it; BOS where None.
      sampler: plain sampling at temperature 1 by default.
      seed: of the sampling key.
      chunk_size: source tokens a step.
      **options: `first_output`, `distance` and `mutual` of `init_groups`.

    Raises:
      ValueError: as `init_groups`; a tokenizer without BOS where `begin` is None.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        source: Cache | Sequence[Cache],
        output: Cache | Sequence[Cache] | None = None,
        *,
        begin: str | Sequence[int] | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
        chunk_size: int = 512,
        **options: Any,
    ):
        if begin is None and tokenizer.bos_id is None:
            raise ValueError("the tokenizer has no BOS: give begin, what the answer begins with")
        self.model, self.tokenizer = model, tokenizer
        self.sampler, self.chunk_size = sampler or Sampler(), chunk_size
        self.stop_ids = stop_ids((*tokenizer.eos_ids, *model.config.eos_token_ids), model.config.vocab_size)
        self.state = init_groups(model, source, output, **options)
        first = [tokenizer.bos_id] if begin is None else begin
        ids = tokenizer.encode(first, add_bos=False, parse_special=True) if isinstance(first, str) else first
        self._unread = [int(token) for token in ids if token is not None]  # of the answer: read with the next one
        self._key, self._drawn, self.stopped = seed, 0, False
        self._output = TextOutput(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of source text that is read next; BOS comes before the first where the model expects one."""
        return self._encoded(text, int(self.state.source.seen[0]) == 0)

    def _encoded(self, text: str, begins: bool) -> list[int]:
        adds = begins and self.tokenizer.adds_bos and self.tokenizer.bos_id is not None
        return self.tokenizer.encode(text, add_bos=adds, continues=not begins)

    def read(self, text: str | Sequence[int]) -> int:
        """Read more of the source; returns how many tokens that were.

        Raises:
          ValueError: more tokens than a `dense` cache has room for; nothing has been read then.
        """
        ids = self.encode(text) if isinstance(text, str) else list(text)
        if ids:
            with undisturbed():
                self.state = read_group(self.model, self.state, [ids], "source", self.chunk_size)
        return len(ids)

    def write(self, max_new_tokens: int) -> Iterator[str]:
        """Write at most so many tokens of the answer, of what was read so far; yields text as it becomes certain."""
        return self.answer((), wait=0, max_new_tokens=max_new_tokens)

    def answer(
        self,
        source: Iterable[str | Sequence[int]],
        *,
        wait: int,
        between: int = 1,
        max_new_tokens: int = 512,
    ) -> Iterator[str]:
        """Read the source's pieces as they come and write meanwhile, by wait-k; yields text as it becomes certain.

        Args:
          source: pieces of text, or of ids, which together go on from what was read.
          wait, between, max_new_tokens: as in `generate_while_reading`.

        Raises:
          ValueError: as there; the answer has ended before.
        """
        if self.stopped:
            raise ValueError("the answer has ended: nothing can be written behind it")
        return self._answer(self._pieces(source), wait, between, max_new_tokens)

    def _pieces(self, source: Iterable[str | Sequence[int]]) -> Iterator[Sequence[int]]:
        begins = int(self.state.source.seen[0]) == 0
        for piece in source:
            ids = self._encoded(piece, begins) if isinstance(piece, str) else piece
            begins = begins and not len(ids)
            yield ids

    def _answer(self, source: Iterable[Sequence[int]], wait: int, between: int, max_new_tokens: int) -> Iterator[str]:
        tokens = generate_while_reading(
            self.model,
            self.state,
            source,
            wait=wait,
            between=between,
            begin=self._unread,
            max_new_tokens=max_new_tokens,
            sampler=self.sampler,
            key=jax.random.key(self._key),
            first_index=self._drawn,
            stop_tokens=self.stop_ids,
            chunk_size=self.chunk_size,
        )
        while True:
            state, token = next(tokens, (None, -1))
            if state is None:
                self._output.release()
                break
            with undisturbed():
                self.state, self._unread = state, [token]
                self._drawn += 1
                self.stopped = token in self.stop_ids
                self._output.push([] if self.stopped else [token])
                if self.stopped:
                    self._output.finish()
            if text := self._output.take():
                yield text
        if text := self._output.take():
            yield text

    def save(self, path: str | Path) -> None:
        """Save both groups and all that the session is besides, to be continued bit for bit by `load`.

        Raises:
          ValueError: `path` holds something that is no checkpoint.
        """
        about = {
            "kind": _KIND,
            "weights": fingerprint(self.model),
            "caches": self._caches(),
            "unread": self._unread,
            "key": self._key,
            "drawn": self._drawn,
            "stopped": self.stopped,
            "output": self._output.to_json_dict(),
        }
        save_pytree(self.state, path, about)

    def load(self, path: str | Path) -> None:
        """Go on where `save` was called, with this session's sampler.

        Raises:
          ValueError: nothing there, it is damaged, or saved with another model or other caches; nothing has changed.
        """
        about = read_about(Path(path), _KIND)
        try:
            if about["weights"] != fingerprint(self.model):
                raise ValueError(f"{path}: saved with another model")
            if about["caches"] != self._caches():
                raise ValueError(f"{path}: saved with other caches")
            unread, drawn = [int(token) for token in about["unread"]], int(about["drawn"])
            key, stopped = int(about["key"]), bool(about["stopped"])
            output = TextOutput(self.tokenizer, **about["output"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: the saved session is damaged: {error!r}") from error
        state = restore_pytree(self.state, path)
        with undisturbed():
            self.state, self._unread, self._key, self._drawn = state, unread, key, drawn
            self.stopped, self._output = stopped, output

    def _caches(self) -> list[list[Any]]:
        return [[described(cache) for cache in group.caches] for group in (self.state.source, self.state.output)]

    @property
    def read_and_written(self) -> tuple[int, int]:
        """Tokens of the source, and of the answer, that the state has read."""
        return int(np.asarray(self.state.source.seen)[0]), int(np.asarray(self.state.output.seen)[0])
