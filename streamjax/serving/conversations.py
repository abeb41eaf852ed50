"""Streams with names, kept between requests: in the host's memory, and on disk as sessions."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jax
import numpy as np

from streamjax.checkpoints import SaveError
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.models.decoder import Decoder
from streamjax.serving.requests import KeptConversation, Sampling
from streamjax.serving.row_states import ParkedState, Parking
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.saving.saved_streams import SavedSession, read_saved_session, restore_stream, save_session
from streamjax.streaming.text_output import TextOutput

_LONGEST_NAME = 200  # characters of a folder's name
_NATS, _ADAPTER = "nats of reading", "adapter of the stream"  # beside what clients keep
log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Conversation:
    """Where a stream stands after its newest request.

    state: None where it is on disk only. output: what its text goes on from. busy: the request that is under way on it.
    saved: whether what is on disk is this. nats: what the tokens that it read cost, and of how many that is known.
    adapter: with which it is read and continued. newest: of its tokens, for guesses; none where it was read from disk.
    """

    name: str
    state: ParkedState | None = None
    tokens_seen: int = 0
    stopped_by: str | int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    output: dict[str, Any] = dataclasses.field(default_factory=lambda: {"tail": [], "held": "", "ready": ""})
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    drawn: int = 0
    nats: tuple[float, int] = (0.0, 0)
    adapter: str | None = None
    newest: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    busy: Any = None
    saved: bool = False


class Conversations:
    """All conversations of an engine. Files are written and read by a thread of its own.

    Args:
      model, tokenizer, parking: of the engine.
      state_dir: where they are saved, a folder each; None keeps them in memory alone.
      budget: bytes of idle streams in memory; beyond them those that are on disk leave it, the longest unused first.

    Raises:
      ValueError: `state_dir` is no folder.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        parking: Parking,
        state_dir: str | Path | None,
        budget: int,
    ):
        self._model, self._tokenizer, self._parking = model, tokenizer, parking
        self._folder = None if state_dir is None else Path(state_dir)
        self._budget = budget
        self._kept: dict[str, Conversation] = {}  # in the order of their newest requests
        self._refused: dict[str, str] = {}  # on disk, and not to be read by this engine: why
        self._lock = threading.RLock()
        self._disk = threading.Lock()  # one save, load or deletion at a time
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "conversations")
        if self._folder is not None:
            self._find_saved(self._folder)

    def _find_saved(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: conversations cannot be kept here ({error.strerror})") from error
        found = [path for path in folder.iterdir() if path.is_dir() and _folder_name(unquote(path.name)) == path.name]
        for path in sorted(found, key=lambda path: path.stat().st_mtime):
            conversation = Conversation(unquote(path.name), saved=True)
            try:
                self._take_over(conversation, self._read_about(path)[0])
            except ValueError as error:
                log.warning("a conversation is not taken up: %s", error)
                self._refused[conversation.name] = str(error)
                continue
            self._kept[conversation.name] = conversation

    def infos(self) -> list[KeptConversation]:
        """What is kept, the newest last."""
        with self._lock:
            return [
                KeptConversation(c.name, c.tokens_seen, c.stopped_by, dict(c.extra), c.busy is not None)
                for c in self._kept.values()
                if c.tokens_seen
            ]

    def costs(self) -> dict[str, tuple[float, int]]:
        """Of each conversation the nats that it read, and the tokens that cost them."""
        with self._lock:
            return {c.name: c.nats for c in self._kept.values()}

    def claim(self, name: str, job: Any, check: Callable[[Conversation], None]) -> Conversation:
        """The conversation of a name, new or kept, for one request alone.

        Raises:
          ValueError: another request is under way on it, the name is none, or `check` says so.
        """
        if not name or len(_folder_name(name)) > _LONGEST_NAME:
            raise ValueError(f"conversation {name[:40]!r}: a name has 1 to {_LONGEST_NAME} letters")
        with self._lock:
            if name in self._refused:
                raise ValueError(f"conversation {name!r} cannot go on, and is not replaced: {self._refused[name]}")
            conversation = self._kept.get(name) or self._new(name)
            if conversation.busy is not None:
                raise ValueError(f"conversation {name!r}: another request is under way on it; wait for its end")
            check(conversation)
            conversation.busy = job
            self._kept[name] = conversation
            return conversation

    def _new(self, name: str) -> Conversation:
        held = sum(c.state.nbytes for c in self._kept.values() if c.state is not None)
        if self._folder is None and held > self._budget:
            raise ValueError(
                f"conversation {name!r}: those that are kept take {held:,} bytes, and conversation_bytes is "
                f"{self._budget:,}; delete one, or give the engine a state_dir"
            )
        return Conversation(name)

    def begin(self, conversation: Conversation) -> concurrent.futures.Future[ParkedState | None]:
        """Its state, read from disk where it is nowhere else; None where it has none."""
        if conversation.state is not None or not conversation.tokens_seen:
            ready: concurrent.futures.Future[ParkedState | None] = concurrent.futures.Future()
            ready.set_result(conversation.state)
            return ready
        return self._thread.submit(self._load, conversation)

    def release(self, conversation: Conversation) -> None:
        """Its request has ended and has changed nothing."""
        with self._lock:
            conversation.busy = None
            if not conversation.tokens_seen and self._kept.get(conversation.name) is conversation:
                del self._kept[conversation.name]

    def finish(self, conversation: Conversation, done: Callable[[], None], **changes: Any) -> None:
        """Its request has ended and it stands elsewhere now; `done` is called when that is on disk."""
        with self._lock:
            for name, value in changes.items():
                setattr(conversation, name, value)
            conversation.busy, conversation.saved = None, False
            if self._kept.get(conversation.name) is conversation:
                del self._kept[conversation.name]
                self._kept[conversation.name] = conversation  # the newest
            snapshot = dataclasses.replace(conversation)
        if self._folder is None:
            done()
        else:
            self._thread.submit(self._save, conversation, snapshot).add_done_callback(lambda _: done())

    def delete(self, name: str) -> tuple[bool, Any]:
        """Forget one, on disk too; whether there was one, and the request that is under way on it."""
        with self._disk:
            with self._lock:
                found = self._kept.pop(name, None)
                known = found is not None or self._refused.pop(name, None) is not None
            if known and self._folder is not None:
                shutil.rmtree(self._folder / _folder_name(name), ignore_errors=True)
        return known, None if found is None else found.busy

    def save(self, name: str) -> None:
        """Save one now.

        Raises:
          ValueError: there is none, it is busy, or there is no `state_dir`.
        """
        if self._folder is None:
            raise ValueError(f"conversation {name!r} cannot be saved: the engine has no state_dir")
        with self._lock:
            found = self._kept.get(name)
            if found is None or not found.tokens_seen:
                raise ValueError(f"there is no conversation {name!r}")
            if found.busy is not None:
                raise ValueError(f"conversation {name!r}: a request is under way on it; wait for its end")
            snapshot = dataclasses.replace(found)
        self._thread.submit(self._save, found, snapshot).result()

    def close(self) -> None:
        """Wait until all is on disk."""
        self._thread.shutdown(wait=True)

    def _save(self, conversation: Conversation, snapshot: Conversation) -> None:
        with self._disk:
            with self._lock:
                stale = self._kept.get(snapshot.name) is not conversation or conversation.state is not snapshot.state
            if stale or snapshot.state is None or conversation.saved:
                return
            assert self._folder is not None
            path = self._folder / _folder_name(snapshot.name)
            try:
                save_session(self._model, self._parking.resume(snapshot.state), self._about(snapshot), path)
            except (SaveError, ValueError) as error:
                log.error("conversation %r is not on disk: %s", snapshot.name, error)
                return
            with self._lock:
                conversation.saved = conversation.state is snapshot.state
        self._make_room()

    def _load(self, conversation: Conversation) -> ParkedState:
        assert self._folder is not None
        path = self._folder / _folder_name(conversation.name)
        with self._disk:
            saved, arrays = self._read_about(path)
            state = restore_stream(self._parking.empty, path, arrays)
            saved.require_agreement(path, state)
        parked = self._parking.park(state.noting_used(self._model.config.vocab_size))
        with self._lock:
            conversation.state = parked
        return parked

    def _make_room(self) -> None:
        with self._lock:
            held = [c for c in self._kept.values() if c.state is not None and c.busy is None]
            total = sum(c.state.nbytes for c in held if c.state is not None)
            for conversation in held:
                if total <= self._budget:
                    return
                if conversation.saved and conversation.state is not None:
                    total -= conversation.state.nbytes
                    conversation.state = None

    def _about(self, one: Conversation) -> SavedSession:
        sampling = one.sampling
        names = [field.name for field in dataclasses.fields(Sampler)]
        return SavedSession(
            tokens_seen=one.tokens_seen,
            stopped_by=one.stopped_by,
            sampler=Sampler(**{name: getattr(sampling, name) for name in names}),
            key=jax.random.key(np.uint32(sampling.seed & 0xFFFFFFFF)),
            drawn=one.drawn,
            output=TextOutput(self._tokenizer, **one.output),
            extra={**one.extra, _NATS: list(one.nats), **({} if one.adapter is None else {_ADAPTER: one.adapter})},
        )

    def _read_about(self, path: Path) -> tuple[SavedSession, Mapping[str, Any]]:
        return read_saved_session(self._model, self._parking.caches, self._tokenizer, path)

    def _take_over(self, conversation: Conversation, saved: SavedSession) -> None:
        conversation.tokens_seen, conversation.stopped_by = saved.tokens_seen, saved.stopped_by
        conversation.output = saved.output.to_json_dict()
        conversation.drawn = saved.drawn
        conversation.extra = {name: value for name, value in saved.extra.items() if name not in (_NATS, _ADAPTER)}
        conversation.adapter = saved.extra.get(_ADAPTER)
        match saved.extra.get(_NATS):
            case [float() as nats, int() as tokens]:
                conversation.nats = (nats, tokens)


def _folder_name(name: str) -> str:
    """A name as that of a folder."""
    return quote(name, safe="").replace(".", "%2E")
