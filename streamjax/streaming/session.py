"""A session: one endless stream on the host's side, with text in and text out.

It owns what a conversation or a reader needs: the model, its tokenizer, the stream's state, the sampler and its key.
Whatever happens between two calls, Ctrl-C included, its state has read exactly the tokens that it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from streamjax.data.text.tokenizers import Tokenizer
from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.cache import Cache
from streamjax.kv.query import Implementation
from streamjax.models.decoder import Decoder, require_looking_ahead
from streamjax.streaming.by_layer.second_mesh import init_apart
from streamjax.streaming.compacting.compact import compact
from streamjax.streaming.compacting.reselecting import Reselection, generate_reselecting
from streamjax.streaming.generate import generate_blocks, stop_ids
from streamjax.streaming.interrupts import undisturbed
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.saving.saved_streams import SavedSession, read_saved_session, restore_stream, save_session
from streamjax.streaming.scan import read, read_prefix, require_finite, score_unwaited
from streamjax.streaming.speculative.drafter import Drafter
from streamjax.streaming.speculative.history import History
from streamjax.streaming.state import init_state
from streamjax.streaming.text_output import TextOutput

Text: TypeAlias = str | Sequence[int] | np.ndarray  # text, or token ids


class Session:
    """One stream of text through one model.

    Attributes:
      state: where the stream stands. tokens_seen: tokens read so far, exact however far the stream is. stopped_by: the
      stop string, or the id of the stop token, that ended the last generation, where nothing was read since; else None.
      sampler: how tokens are chosen; may be replaced between calls. A repetition penalty meets every id that the stream
      has read. stop_ids: ids that end a generation: the tokenizer's (its own EOS, and those of generation_config.json)
      and the model's (those of config.json), together.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      cache: a cascade for all layers, or one a layer.
      sampler: how to choose tokens; plain sampling at temperature 1 by default.
      seed: of the sampling key.
      chunk_size: tokens a step when reading.
      implementation: what reads the cache, as in `init_state`.
      parse_special: whether special tokens that are written out in a text, such as "<|im_end|>", are those tokens. They
        are text by default, since users may type anything; ids are always read as they are.
      draft: who guesses tokens that the model then reads several at a time, such as `sj.NGrams()`; what is generated is
        the same, only faster. It may be replaced between calls.
      reselect: a smaller cache that answers read instead, chosen anew every few tokens of what `cache` holds
        (LoopServe); text then comes in pieces of so many tokens. It may be replaced between calls.
      cache_mesh: devices without the model, on which the last tier of each layer's cache lies and is attended to
        (`by_layer.second_mesh`); for dense and inst_infer:attend_on=mesh. Drafts, `reselect` and `compact` are not
        there for it.

    Raises:
      ValueError: the tokenizer has ids that the model lacks, a stop id among them, an unknown implementation, two of
        `draft`, `reselect` and `cache_mesh`, or a cache that cannot lie on a second mesh.

    Example:
      >>> session = sj.Session(model, tokenizer, sj.kv.preset("streaming_llm", sinks=4, window=60), sampler=greedy)
      >>> session.read("Once upon a time")  # tokens; the first is the tokenizer's BOS
      17
      >>> answer = "".join(session.generate(max_new_tokens=8))
      >>> session.tokens_seen
      25
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        cache: Cache | Sequence[Cache],
        *,
        sampler: Sampler | None = None,
        seed: int = 0,
        chunk_size: int = 512,
        implementation: Implementation | None = None,
        parse_special: bool = False,
        draft: Drafter | None = None,
        reselect: Reselection | None = None,
        cache_mesh: Mesh | None = None,
    ):
        if draft is not None and reselect is not None:
            raise ValueError("guessed tokens are read by the stream's own cache: give draft or reselect, not both")
        if cache_mesh is not None and (draft is not None or reselect is not None):
            raise ValueError(
                "neither a draft nor a smaller cache for answers reads a second mesh: leave cache_mesh away"
            )
        if tokenizer.text_vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.text_vocab_size} ids and the model {model.config.vocab_size}: "
                "they do not belong together"
            )
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
        self.stop_ids = stop_ids((*tokenizer.eos_ids, *model.config.eos_token_ids), model.config.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.sampler = sampler or Sampler()
        self.chunk_size = chunk_size
        self.implementation = implementation
        self.parse_special = parse_special
        self.draft = draft
        self.reselect = reselect
        self.cache_mesh = cache_mesh
        self._history = History()
        self.reset(seed)

    def reset(self, seed: int = 0) -> None:
        """Start over, as if nothing had been read."""
        if self.cache_mesh is None:
            state = init_state(self.model, self.cache, implementation=self.implementation, note_used=True)
        else:
            state = init_apart(self.model, self.cache, self.cache_mesh, implementation=self.implementation)
            state = state.noting_used(self.model.config.vocab_size)
        if self.draft is not None:
            self.draft.learn(self._history.tokens)
        with undisturbed():
            self.state = state
            self._history = History()
            self.tokens_seen = 0
            self.stopped_by: str | int | None = None
            self._key = jax.random.key(seed)
            self._drawn = 0
            self._turn = object()  # replaced by whoever moves the stream: an older generate() notices
            self._output = TextOutput(self.tokenizer)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the stream's state: constant, however long the stream."""
        return self.state.cache_bytes

    @property
    def room(self) -> int | None:
        """Tokens that still fit, where the cache has an end."""
        return None if self.state.capacity is None else self.state.capacity - self.tokens_seen

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of a text that is read next: it goes on from what was read, so that pieces add up to the whole text.

        BOS comes before it by default where the stream begins and the model expects one.
        """
        begins = self._begins(add_bos)
        return self.tokenizer.encode(
            text, add_bos=begins, parse_special=self.parse_special, continues=self.has_text and not begins
        )

    @property
    def has_text(self) -> bool:
        """Whether the stream holds more than special tokens such as BOS: a text that is read next goes on from it."""
        tail = self._output.tail
        return self.tokens_seen > len(tail) or not self.tokenizer.special_ids.issuperset(tail)

    def read(self, text: Text, *, add_bos: bool | None = None, twice: bool = False, prefix: bool = False) -> int:
        """Read a text, or token ids as they are; returns how many tokens that were.

            session.read(document + question, twice=True)
            session.read(document, prefix=True)

        Args:
          text: text, or token ids.
          add_bos: as in `encode`.
          twice: read it again behind itself (JRT, 2407.05483): a state of fixed size chooses what to keep, and the
            second time it is known what is asked. BOS comes before the first time alone.
          prefix: layers of prefix linear attention look at all of it first, as at their prompt (`read_prefix`).

        Raises:
          ValueError: no room in a `dense` cache, or no layer that looks ahead; nothing has been read then.
        """
        ids = self._ids(text, add_bos)
        if twice and isinstance(text, str):
            ids += self.tokenizer.encode(text, add_bos=False, parse_special=self.parse_special, continues=bool(ids))
        elif twice:
            ids += ids
        if prefix:
            require_looking_ahead(self.model.config)
        for piece in self._pieces(ids, whole=prefix):
            with undisturbed():
                self.state = (read_prefix if prefix else read)(self.model, self.state, piece[None], self.chunk_size)
                self.tokens_seen += len(piece)
                self._history.extend(piece)
        return len(ids)

    def score(self, text: Text, *, add_bos: bool | None = None, wait: bool = True) -> Float[Array, " T"]:
        """Read a text and return what each of its tokens cost: negative log-likelihoods in nats.

        A BOS that is put before the text is not part of the result. The first token of a stream without BOS costs
        log(vocabulary).

        Args:
          text: text, or token ids.
          add_bos: as in `encode`.
          wait: wait for the result and see that it is finite. Without it a caller can hand the next text to the device
            first, and look at the result itself: `require_finite`.

        Raises:
          ValueError: as in `read`; a result that is not finite (`NotFiniteError`, which says where the model first went
            wrong).
        """
        skip = isinstance(text, str) and self._begins(add_bos)
        ids = self._ids(text, add_bos)
        parts = [jnp.zeros((0,), jnp.float32)]
        before = np.zeros(0, np.int32)
        for piece in self._pieces(ids):
            with undisturbed():
                lengths = np.array([len(piece)])
                self.state, nats = score_unwaited(self.model, self.state, piece[None], self.chunk_size, lengths=lengths)
                self.tokens_seen += len(piece)
                self._history.extend(piece)
            if wait:  # for the piece before: the device has work meanwhile
                self.require_finite(parts[-1], before)
            parts.append(nats[0])
            before = piece
        if wait:
            self.require_finite(parts[-1], before)
        return jnp.concatenate(parts)[skip:]

    def require_finite(self, nats: Float[Array, " T"] | np.ndarray, text: Text) -> None:
        """Raise a `NotFiniteError` unless what a text cost, by `score`, is finite; it waits for the result."""
        ids = self._ids(text, add_bos=False)
        require_finite(self.model, np.asarray(nats)[None], np.asarray(ids, np.int32)[None])

    def generate(
        self,
        prompt: Text = "",
        *,
        max_new_tokens: int,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        add_bos: bool | None = None,
        block: int | None = None,
    ) -> Iterator[str]:
        """Read a prompt and continue it; yields text as it becomes certain.

        Without a prompt the stream goes on where it stands: two calls in a row draw what one would have drawn. When the
        iterator is left early, the state has read what was yielded, and at most the rest of one block. On Ctrl-C, text
        that was generated but not yielded is what `pending` returns.

        Args:
          prompt: text, or token ids.
          max_new_tokens: at most so many.
          stop: strings that end the text; they do not appear in it, and what their last token holds behind them is
            dropped.
          stop_tokens: ids that end it; `stop_ids` where None. The state has read them.
          add_bos: as in `encode`.
          block: tokens between two pieces of text. By default 1 on CPU and with stop strings, else 16.

        Raises:
          ValueError: no room in a `dense` cache for prompt and continuation, nothing to continue, or logits that are
            not finite (`NotFiniteError`, which says where they first were); what came before has been yielded.
        """
        words = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in words:
            raise ValueError("a stop string must not be empty")
        ids = self._ids(prompt, add_bos)
        if not ids and self.tokens_seen == 0:
            raise ValueError("nothing to continue: give a prompt, or read something first")
        self._require_room(len(ids) + max_new_tokens)
        if block is None or words:
            block = 1 if words or jax.default_backend() == "cpu" else 16
        ends = self.stop_ids if stop_tokens is None else stop_ids(stop_tokens, self.model.config.vocab_size)
        return self._generate(ids, max_new_tokens, words, ends, block)

    def _generate(
        self, ids: list[int], max_new_tokens: int, stop: tuple[str, ...], ends: tuple[int, ...], block: int
    ) -> Iterator[str]:
        self.read(ids)
        turn = self._turn = object()
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "sampler": self.sampler,
            "key": self._key,
            "stop_tokens": ends,
            "first_index": self._drawn,
        }
        limit = partial(self._until_end, stop, ends) if stop else None
        if self.reselect is not None:
            recent = self._history.tokens[-self.reselect.asked :].tolist()
            options |= {"chunk_size": self.chunk_size, "until": limit}
            blocks = generate_reselecting(self.model, self.state, recent, self.reselect, **options)
        else:
            options |= {"block": block, "draft": self.draft, "histories": [self._history], "limit": limit}
            blocks = generate_blocks(self.model, self.state, np.zeros((1, 0), np.int32), **options)
        drafted = self.draft is not None
        ended = False
        while not ended:
            if self._turn is not turn:
                raise ValueError("this session has gone on since: an older generate() cannot be continued")
            with undisturbed():
                state, tokens = next(blocks, (None, None))
                if state is None or tokens is None:
                    self._output.release()
                    ended = True
                else:
                    self.state = state
                    new = [int(token) for token in tokens[0] if token >= 0]
                    self._drawn = (self._drawn + len(new)) % 2**31
                    self.tokens_seen += len(new)
                    if not drafted:  # otherwise the loop has noted them
                        self._history.extend(new)
                    over = new[-1] if new and new[-1] in ends else None
                    self.stopped_by = self._output.push(new if over is None else new[:-1], stop)
                    if over is not None and self.stopped_by is None:
                        self.stopped_by = over
                        self._output.finish()
                    ended = self.stopped_by is not None
            if text := self._output.take():
                yield text

    def pending(self) -> str:
        """Text that was generated but not yielded yet, after an interrupt; it is handed out once."""
        self._output.release()
        return self._output.take()

    def compact(
        self,
        cache: Cache | Sequence[Cache],
        query: Text | None = None,
        *,
        stored: bool = False,
    ) -> None:
        """Go on under another cache, for instance at the end of a prompt or between two turns (`sj.compact`).

        Args:
          cache: the new cache; the session starts over with it too.
          query: the text, or its token ids, whose attention decides where the cache chooses by attention.
          stored: the query is the end of what was read, in the same tokens; otherwise it would come next. It is not
            read into the stream either way.

        Raises:
          ValueError: as `sj.compact`; the session is as before then.
        """
        ids = None if query is None else np.asarray([self._ids(query, add_bos=False)], np.int32)
        state = compact(self.model, self.state, cache, ids, stored=stored)
        with undisturbed():
            self.state, self._turn = state, object()
            self.cache = state.caches if isinstance(cache, Budgeted) else cache

    @property
    def is_finite(self) -> bool:
        """Whether the model's last outputs are finite numbers: only then can the stream go on, and be saved."""
        return bool(jnp.isfinite(self.state.hidden).all())

    def save(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        """Save the stream, to be continued bit for bit by `load`, in another process too.

        Args:
          path: a folder; an earlier save in it is replaced.
          extra: what else to keep; plain data, returned by `load`.

        Raises:
          ValueError: `path` holds something else, or the model has computed values that are not finite; nothing is
            written then.
        """
        if not self.is_finite:
            raise ValueError(f"{path}: nothing is saved, the stream's state is not finite")
        saved = SavedSession(
            tokens_seen=self.tokens_seen,
            stopped_by=self.stopped_by,
            sampler=self.sampler,
            key=self._key,
            drawn=self._drawn,
            output=self._output,
            extra=dict(extra or {}),
        )
        save_session(self.model, self.state, saved, path)

    def load(self, path: str | Path, accept: Callable[[dict[str, Any]], object] | None = None) -> dict[str, Any]:
        """Go on where `save` was called: same tokens, same key, same sampler. Returns what was saved as `extra`.

        Of a session that an older version saved a repetition penalty meets only what is read from here on.

        Args:
          path: what `save` wrote.
          accept: is given `extra` before anything changes; it raises a ValueError where that is not what it expects.

        Raises:
          ValueError: nothing there, it is damaged, or saved with another model or cache; the session is as before then.
        """
        saved, arrays = read_saved_session(self.model, self.state.caches, self.tokenizer, path)
        if accept is not None:
            accept(saved.extra)
        state = restore_stream(self.state, path, arrays).noting_used(self.model.config.vocab_size)
        saved.require_agreement(path, state)
        with undisturbed():
            self.state = state
            self.tokens_seen, self.stopped_by = saved.tokens_seen, saved.stopped_by
            self.sampler, self._key, self._drawn = saved.sampler, saved.key, saved.drawn
            self._turn = object()
            self._output = saved.output
            self._history = History(saved.output.tail)
        return saved.extra

    def _begins(self, add_bos: bool | None) -> bool:
        """Whether BOS goes before the next text."""
        wanted = self.tokens_seen == 0 and self.tokenizer.adds_bos if add_bos is None else add_bos
        return wanted and self.tokenizer.bos_id is not None

    def _ids(self, text: Text, add_bos: bool | None) -> list[int]:
        """Token ids, all checked before the first piece is read."""
        ids = self.encode(text, add_bos) if isinstance(text, str) else [int(token) for token in text]
        vocab = self.model.config.vocab_size
        wrong = next((token for token in ids if not 0 <= token < vocab), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is outside the model's vocabulary of {vocab}")
        return ids

    def _pieces(self, ids: Sequence[int], whole: bool = False) -> Iterator[np.ndarray]:
        """Tokens to be read step by step, or all at once; text that was held back is over."""
        self._require_room(len(ids))
        if ids:
            self._turn = object()
            self._output.restart(ids)
            self.stopped_by = None
        tokens = np.asarray(ids, np.int32)
        size = max(len(ids), 1) if whole else self.chunk_size
        for start in range(0, len(ids), size):
            yield tokens[start : start + size]

    def _until_end(self, stop: tuple[str, ...], ends: tuple[int, ...], tokens: Sequence[int]) -> int:
        """How many of the tokens that may come next are read at most: none behind the end of the text."""
        output = self._output.copy()
        for i, token in enumerate(tokens):
            if token in ends or output.push([token], stop) is not None:
                return i + 1
        return len(tokens)

    def _require_room(self, tokens: int) -> None:
        if self.room is not None and tokens > self.room:
            raise ValueError(
                f"the cache holds {self.state.capacity} tokens: {self.tokens_seen} are used and {tokens} more do not "
                "fit; use one of more capacity, or one without end such as streaming_llm"
            )
