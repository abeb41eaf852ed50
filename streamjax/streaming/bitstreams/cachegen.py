"""CacheGen (Liu et al., 2310.07240): the keys and values of a text as few bits, to be sent to where it is read on.

Tokens next to each other have keys and values that are alike. So of every ten the first is an anchor, in eight bits a
number, and of the others the difference to it is coded: rounded to steps that grow from the first third of the layers
to the last, which matters least, and then by a table of frequencies for each layer and channel, measured beforehand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt16
from safetensors.numpy import save_file

from streamjax.checkpoints import user_path
from streamjax.checkpoints.measured_files import measured_file
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.slots import dense
from streamjax.kv.tiers.full import Full
from streamjax.models.decoder import Decoder
from streamjax.streaming.bitstreams import entropy_coder
from streamjax.streaming.reuse.rearranging import dense_capacity
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.state import StreamState, init_state, rotated_otherwise

GROUP = 10  # tokens that share an anchor
MOST = 63  # steps that a difference has at most, either way
STEPS = (0.5, 1.0, 1.5)  # of the first, second and last third of the layers, in standard deviations of differences
LEVELS = (0.5, 1.0, 2.0)  # by which steps are multiplied, the finest level first
_MAGIC = b"streamjax KV 1\n"


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """What `measure_profile` measures: N = 2 x layers, keys and values of each in turn, and C channels of all heads.

    deviation: of differences to anchors. tables: frequencies of rounded differences at each level. model: a fingerprint
    of the model's weights.
    """

    deviation: Float[np.ndarray, "N C"]
    tables: UInt16[np.ndarray, "L N C S"]
    model: str

    @cached_property
    def name(self) -> str:
        """Tells profiles apart."""
        return hashlib.sha256(self.deviation.tobytes() + self.tables.tobytes()).hexdigest()[:16]

    def step(self, level: int) -> Float[np.ndarray, "N 1 C"]:
        """What differences are multiples of. No difference is 0 wide, where a channel never changes."""
        layers = len(self.deviation) // 2
        thirds = np.repeat([STEPS[min(3 * i // layers, 2)] for i in range(layers)], 2)
        width = LEVELS[level] * thirds[:, None] * self.deviation
        return np.maximum(width, 1e-6).astype(np.float32)[:, None]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata is the card."""
        about = {
            "kind": "profile of a KV bitstream",
            "model": self.model,
            "card": "How keys and values differ from those of tokens in front of them, and how often; for the "
            "bitstreams of streamjax (CacheGen, arXiv 2310.07240), and for this model alone.",
        }
        save_file({"deviation": self.deviation, "tables": self.tables}, user_path(path), metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        otherwise = "it has no frequencies of keys and values"
        with measured_file(path, "profile of a KV bitstream", "profile of a bitstream", otherwise) as (file, about):
            deviation, tables = file.get_tensor("deviation"), file.get_tensor("tables")
            shape = (len(LEVELS), *deviation.shape, 2 * MOST + 1)
            if tables.shape != shape or (tables.astype(np.int64).sum(axis=-1) != 1 << entropy_coder.PRECISION).any():
                raise ValueError(otherwise)
            return cls(deviation, tables, about["model"])


def measure_profile(model: Decoder, state: StreamState) -> Profile:
    """How the keys and values of streams differ from their anchors, from a dense state of some text.

    Raises:
      ValueError: a state that is not dense, layers of different widths, or fewer than two groups of ten tokens.
    """
    x = np.concatenate([_held(model, state, row, 0, None) for row in range(state.batch_size)], axis=1)
    if x.shape[1] < 2 * GROUP:
        raise ValueError(f"a profile needs at least {2 * GROUP} tokens, and the streams have {x.shape[1]}")
    codes, scale = _anchors(x)
    difference = _differences(x, codes, scale)
    deviation = np.std(difference, axis=1).astype(np.float32)
    empty = np.zeros((0, *deviation.shape, 0), np.uint16)
    profile = Profile(deviation, empty, fingerprint_in_any_dtype(model))
    tables = []
    for level in range(len(LEVELS)):
        symbols = _symbols(difference, profile.step(level))
        lanes = symbols.swapaxes(1, 2).reshape(-1, symbols.shape[1])
        counts = [np.bincount(lane, minlength=2 * MOST + 1) for lane in lanes]
        tables.append(entropy_coder.table(np.array(counts, np.float64)).reshape(*x.shape[::2], -1))
    return dataclasses.replace(profile, tables=np.stack(tables))


def encode(
    model: Decoder, state: StreamState, profile: Profile, *, level: int = 1, row: int = 0, start: int = 0,
    stop: int | None = None,
) -> bytes:  # fmt: skip
    """The keys and values of tokens `start` to `stop` of one stream, and where it stands.

        bits = [encode(model, state, profile, start=at, stop=at + 1500) for at in range(0, 6000, 1500)]
        state = decode(model, bits, profile, capacity=8192)   # elsewhere, with the same model and profile

    Args:
      model: that has read the stream.
      state: dense, as `dense` keeps it.
      profile: of this model, `measure_profile`.
      level: 0 is the finest, with steps half as wide as those of the paper's, 1 the paper's, 2 the coarsest.
      row: which stream.
      start, stop: which of its tokens; all to the newest where None.

    Raises:
      ValueError: a state that is not dense, a profile of another model, or a level or tokens that there are not.
    """
    _require_own(model, profile)
    if level not in range(len(LEVELS)):
        raise ValueError(f"level is {level}: it must be from 0, the finest, to {len(LEVELS) - 1}")
    x = _held(model, state, row, start, stop)
    if x.shape[::2] != profile.deviation.shape:
        raise ValueError(f"the profile is of {profile.deviation.shape} lanes, and the state has {x.shape[::2]}")
    codes, scale = _anchors(x)
    symbols = _symbols(_differences(x, codes, scale), profile.step(level))
    lanes = symbols.swapaxes(0, 1).reshape(symbols.shape[1], -1)
    states, words = entropy_coder.encode(lanes, profile.tables[level].reshape(lanes.shape[1], -1))
    hidden = np.asarray(state.hidden[row], np.float32)
    seen = int(np.asarray(state.seen)[row])
    about = {
        "profile": profile.name, "level": level, "start": start, "tokens": x.shape[1], "seen": seen,
        "position": int(np.asarray(state.position)[row]), "words": len(words), "span": state.span,
    }  # fmt: skip
    parts = [codes.tobytes(), scale.tobytes(), states.tobytes(), words.tobytes(), hidden.tobytes()]
    head = json.dumps(about).encode()
    body = struct.pack("<I", len(head)) + head + b"".join(parts)
    return _MAGIC + hashlib.sha256(body).digest()[:8] + body


def decode(model: Decoder, bits: Sequence[bytes], profile: Profile, *, capacity: int) -> StreamState:
    """A dense state of one stream out of what `encode` wrote of successive tokens, of any levels.

    Args:
      model, profile: with which it was encoded.
      bits: from the stream's first token to its newest.
      capacity: tokens that the state has room for.

    Raises:
      ValueError: bits that are damaged, of another model or profile, or of other tokens than follow each other.
    """
    _require_own(model, profile)
    read = [_read(one, profile, model.config.d_model) for one in bits]
    at = 0
    for about, *_ in read:
        if about["start"] != at or about["seen"] != read[0][0]["seen"]:
            raise ValueError(f"the bits of tokens from {about['start']} on follow token {at}: give them in order")
        at += about["tokens"]
    if not read or at != read[0][0]["seen"]:
        raise ValueError(f"the bits end at token {at}, and the stream has {read[0][0]['seen'] if read else 'some'}")
    state = init_state(model, Cascade(Full(capacity)), position=read[0][0]["position"] - at)
    if at > capacity or rotated_otherwise(model.config, state.span, read[0][0]["span"]) is not None:
        raise ValueError(f"a stream of {at} tokens does not fit a cache of {capacity}, which ends or rotates otherwise")
    whole = np.concatenate([x for _, x, _ in read], axis=1)
    layers = []
    for i, (held,) in enumerate(state.layers):
        k, v = (_placed(part, whole[2 * i + j]) for j, part in enumerate((held.k, held.v)))
        place = jnp.arange(held.position.shape[2], dtype=jnp.uint32) + state.position[:, None, None]
        position = jnp.where(jnp.arange(place.shape[2]) < at, place, held.position)
        layers.append((dataclasses.replace(held, k=k, v=v, position=position, filled=held.filled + at),))
    return dataclasses.replace(
        state,
        layers=tuple(layers),
        position=state.position + jnp.uint32(at),
        seen=state.seen + at,
        hidden=jnp.asarray(read[-1][2][None], state.hidden.dtype),
    ).placed()


def _require_own(model: Decoder, profile: Profile) -> None:
    if profile.model != (own := fingerprint_in_any_dtype(model)):
        raise ValueError(f"the profile was measured with model {profile.model}, and this one is {own}: measure_profile")


def _held(model: Decoder, state: StreamState, row: int, start: int, stop: int | None) -> Float[np.ndarray, "N T C"]:
    """Keys and values of some tokens of a stream, a layer's after those of the one before it."""
    dense_capacity(model, state, "a bitstream")
    seen = int(np.asarray(state.seen)[row])
    stop = seen if stop is None else min(stop, seen)
    if not 0 <= start < stop:
        raise ValueError(f"there are no tokens from {start} to {stop}: the stream has {seen}")
    lines = []
    for (held,) in state.layers:
        for part in (held.k, held.v):
            x = np.asarray(dense(part)[row, :, start:stop], np.float32)
            lines.append(x.swapaxes(0, 1).reshape(stop - start, -1))
    if len({line.shape[1] for line in lines}) > 1:
        raise ValueError("a bitstream needs keys and values of one width in all layers")
    return np.stack(lines)


def _anchors(x: Float[np.ndarray, "N T C"]) -> tuple[np.ndarray, np.ndarray]:
    """The first token of each group in whole numbers of eight bits, and what a channel's are multiples of."""
    first = x[:, ::GROUP]
    scale = np.maximum(np.max(np.abs(first), axis=1) / 127, 1e-6).astype(np.float32)
    return np.round(first / scale[:, None]).astype(np.int8), scale


def _others(tokens: int) -> np.ndarray:
    """Tokens that are no anchors."""
    index = np.arange(tokens)
    return index[index % GROUP > 0]


def _beside(codes: np.ndarray, scale: np.ndarray, tokens: int) -> Float[np.ndarray, "N T C"]:
    """The anchor of each token, as it comes out again."""
    return np.repeat(codes.astype(np.float32) * scale[:, None], GROUP, axis=1)[:, :tokens]


def _differences(x: Float[np.ndarray, "N T C"], codes: np.ndarray, scale: np.ndarray) -> Float[np.ndarray, "N t C"]:
    return (x - _beside(codes, scale, x.shape[1]))[:, _others(x.shape[1])]


def _symbols(difference: Float[np.ndarray, "N t C"], step: np.ndarray) -> np.ndarray:
    return np.clip(np.round(difference / step), -MOST, MOST).astype(np.int64) + MOST


def _read(bits: bytes, profile: Profile, width: int) -> tuple[dict[str, Any], Float[np.ndarray, "N T C"], np.ndarray]:
    """What `encode` says of tokens, their keys and values, and the stream's hidden state."""
    start = len(_MAGIC) + 8
    if bits[: len(_MAGIC)] != _MAGIC or hashlib.sha256(bits[start:]).digest()[:8] != bits[len(_MAGIC) : start]:
        raise ValueError("these bits are damaged, or not what encode wrote")
    (size,) = struct.unpack_from("<I", bits, start)
    about = json.loads(bits[start + 4 : start + 4 + size])
    if about["profile"] != profile.name:
        raise ValueError(f"the bits were made with profile {about['profile']}, and this one is {profile.name}")
    (count, channels), tokens, at = profile.deviation.shape, about["tokens"], start + 4 + size

    def take(kind: type, *shape: int) -> np.ndarray:
        nonlocal at
        found: np.ndarray = np.frombuffer(bits, kind, int(np.prod(shape)), at).reshape(shape)
        at += found.nbytes
        return found

    codes, scale = take(np.int8, count, -(-tokens // GROUP), channels), take(np.float32, count, channels)
    states, words = take(np.uint32, count * channels), take(np.uint16, about["words"])
    hidden, tables = take(np.float32, width), profile.tables[about["level"]].reshape(count * channels, -1)
    others = _others(tokens)
    symbols = entropy_coder.decode(states, words, tables, len(others)).reshape(len(others), count, channels)
    x = _beside(codes, scale, tokens)
    x[:, others] += (symbols.swapaxes(0, 1) - MOST) * profile.step(about["level"])
    return about, x, hidden


def _placed(empty: Any, line: Float[np.ndarray, "T C"]) -> Any:
    """A buffer [1, K, S, D] with the keys or values of tokens in its first slots."""
    x = line.reshape(len(line), empty.shape[1], -1).swapaxes(0, 1)[None]
    return empty.at[:, :, : len(line)].set(jnp.asarray(x, empty.dtype))
