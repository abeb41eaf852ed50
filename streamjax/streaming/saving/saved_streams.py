"""Streams on disk: saved where they stand, continued bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from streamjax.checkpoints import read_about, restore_pytree, save_pytree
from streamjax.checkpoints.json_files import one_line
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.field_checks import described
from streamjax.kv.cache import Cache
from streamjax.models.config import parse_config
from streamjax.models.decoder import Decoder
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.saving.fingerprints import fingerprint
from streamjax.streaming.state import SEEN_LIMIT, StreamState
from streamjax.streaming.text_output import TextOutput

_SESSION = "session"
_KINDS: dict[str, tuple[type, ...]] = {
    "tokens_seen": (int,),
    "stopped_by": (type(None), str, int),
    "sampler": (dict,),
    "key": (list,),
    "drawn": (int,),
    "output": (dict,),
    "extra": (dict,),
}


def save_stream(state: StreamState, path: str | Path) -> None:
    """Save streams where they stand, to be continued bit for bit after `load_stream`.

    Raises:
      ValueError: `path` holds something that is no checkpoint.

    Example:
      >>> sj.save_stream(sj.read(model, state, prompt), "stream")
    """
    save_pytree(state, path, {"kind": "stream", "caches": [described(cache) for cache in state.caches]})


def load_stream(path: str | Path, like: StreamState) -> StreamState:
    """Streams as they were saved.

    Args:
      path: what `save_stream` wrote.
      like: a state of the same model, caches and batch size, such as `init_state` makes; its content plays no part.

    Raises:
      ValueError: the stream was saved with other caches, or another model.

    Example:
      >>> sj.save_stream(sj.read(model, state, prompt), "stream")
      >>> like = sj.init_state(model, sj.kv.preset("dense", capacity=128))
      >>> sj.load_stream("stream", like).seen.tolist()
      [16]
    """
    about = read_about(Path(path), "stream")
    if not isinstance(about.get("caches"), list):
        raise ValueError(f"{path} is damaged: it does not say with which caches it was saved")
    for layer, (saved, cache) in enumerate(zip(about["caches"], like.caches, strict=False)):
        if saved != described(cache):
            here = f"{cache!r} here: use that cache"
            raise ValueError(f"{path}: saved with {one_line(saved)} in layer {layer}, which is {here}")
    return restore_stream(like, path, about["arrays"])


def restore_stream(like: StreamState, path: str | Path, arrays: Mapping[str, Any]) -> StreamState:
    """The state at `path`, whose arrays are described by `arrays`; with `used` where it was saved with it."""
    if "used" not in arrays:
        return restore_pytree(dataclasses.replace(like, used=None), path)
    return restore_pytree(like.noting_used(arrays["used"][-1]), path)


@dataclasses.dataclass(frozen=True)
class SavedSession:
    """What a session is besides its model and its state, checked field by field before any of it is used."""

    tokens_seen: int
    stopped_by: str | int | None
    sampler: Sampler
    key: Array
    drawn: int
    output: TextOutput
    extra: dict[str, Any]

    def to_json_dict(self) -> dict[str, Any]:
        """Plain data, from which `from_json_dict` makes it again."""
        return {
            "tokens_seen": self.tokens_seen,
            "stopped_by": self.stopped_by,
            "sampler": dataclasses.asdict(self.sampler),
            "key": np.asarray(jax.random.key_data(self.key)).tolist(),
            "drawn": self.drawn,
            "output": self.output.to_json_dict(),
            "extra": self.extra,
        }

    @classmethod
    def from_json_dict(cls, saved: Mapping[str, Any], tokenizer: Tokenizer, path: str | Path) -> SavedSession:
        """What `to_json_dict` wrote; `path` is where it was found.

        Raises:
          ValueError: a field is missing, or is not what was written.
        """
        try:
            for name, kinds in _KINDS.items():
                if type(saved[name]) not in kinds:
                    raise TypeError(f"{name} is {saved[name]!r}")
            held = saved["output"]
            if not all(isinstance(held[name], str) for name in ("held", "ready")):
                raise TypeError(f"output is {held!r}")
            words = jax.random.key_data(jax.random.key(0)).shape
            return cls(
                tokens_seen=saved["tokens_seen"],
                stopped_by=saved["stopped_by"],
                sampler=Sampler(**saved["sampler"]),
                key=jax.random.wrap_key_data(jnp.asarray(np.asarray(saved["key"], np.uint32).reshape(words))),
                drawn=saved["drawn"] % 2**31,
                output=TextOutput(tokenizer, [int(token) for token in held["tail"]], held["held"], held["ready"]),
                extra=saved["extra"],
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}: the saved session is damaged: {what}") from error

    def require_agreement(self, path: str | Path, state: StreamState) -> None:
        """Raise a ValueError unless the state stands where the session says that it does."""
        position, seen = int(state.position[0]), int(state.seen[0])
        if self.tokens_seen % 2**32 != position or min(self.tokens_seen, SEEN_LIMIT) != seen:
            says = f"it says that {self.tokens_seen} tokens were read, its state has read {seen}"
            raise ValueError(f"{path}: the saved session is damaged: {says}")


def save_session(model: Decoder, state: StreamState, saved: SavedSession, path: str | Path) -> None:
    """Save a session's stream, of one row, with all that the session is besides; an earlier save is replaced.

    Raises:
      ValueError: `path` holds something that is no checkpoint.
    """
    about = {
        "kind": _SESSION,
        "model": model.config.to_json_dict(),
        "weights": fingerprint(model),
        "caches": [described(cache) for cache in state.caches],
        **saved.to_json_dict(),
    }
    save_pytree(state, path, about)


def read_saved_session(
    model: Decoder, caches: Sequence[Cache], tokenizer: Tokenizer, path: str | Path
) -> tuple[SavedSession, Mapping[str, Any]]:
    """What `save_session` wrote besides the stream, and what `restore_stream` is told of the stream's arrays.

    Raises:
      ValueError: nothing there, it is damaged, or saved with another model or with other caches.
    """
    about = read_about(Path(path), _SESSION)
    try:
        config = parse_config(about["model"])
        weights, saved_caches = about["weights"], list(about["caches"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the saved session is damaged: {error!r}") from error
    if config.replace(eos_token_ids=()) != model.config.replace(eos_token_ids=()):
        raise ValueError(f"{path}: saved with another model ({_shape(config)}); this is {_shape(model.config)}")
    if weights != fingerprint(model):
        raise ValueError(f"{path}: saved with a model of the same shape but other weights or another dtype")
    for saved, cache in itertools.zip_longest(saved_caches, caches):
        if saved != described(cache):
            raise ValueError(f"{path}: saved with the cache {one_line(saved)}; this session has {cache!r}")
    return SavedSession.from_json_dict(about, tokenizer, path), about["arrays"]


def _shape(config: Any) -> str:
    return f"{config.family}, {config.num_layers} layers of width {config.d_model}, vocabulary {config.vocab_size}"
