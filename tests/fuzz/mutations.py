"""Changes that chance makes to bytes and to JSON, and what is asked of their readers: work, or refuse in one line."""

import copy
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from streamjax.evaluation import peak_resident_bytes

T = TypeVar("T")
SLOW = 20.0  # CPU seconds after which a reader counts as one that hangs
LARGE = 2e9  # bytes by which it may raise the process's peak
PIECES = [
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"9" * 40,
    b"true",
    b"\xff",
    b"\x00",
    b"[" * 5000,
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**30,
    0.5,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x00",
    "naïve \U0001f600",
    "a\nb",
    "%s{0}$(x)",
    "x" * 3000,
    [],
    {},
    [[]],
    [-1, "x", None],
    {"x": {"": 0}},
]


class TooSlow(BaseException):
    """A reader has not come back; no Exception, so that none takes it for a fault of the file."""


def draws(few: int, many: int | None = None) -> pytest.MarkDecorator:
    """Parametrizes a test over how many changes it draws: `few`, or `many`, ten times as many, where slow tests run."""
    return pytest.mark.parametrize("draws", [few, pytest.param(many or 10 * few, marks=pytest.mark.slow)])


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One change: a bit, a cut, something put in, or a stretch taken out."""
    if not data:
        return rng.choice(PIECES)
    at = rng.randrange(len(data))
    match rng.randrange(4):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + rng.choice(PIECES) + data[at + rng.randrange(4) :]
    return data[:at] + data[at + rng.randrange(1, 40) :]


def mutate_json(tree: Any, rng: random.Random) -> Any:
    """A copy with one change somewhere: another value, an entry that is gone, renamed, repeated or swapped."""
    tree = {"root": copy.deepcopy(tree)}  # so that the root too lies in something
    places = list(_places(tree))
    holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[f"{key}{rng.choice(['x', ' ', chr(0), '.', '0'])}"] = holder.pop(key)
        case 1:
            holder.insert(key, copy.deepcopy(holder[key]))
        case 2:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place])
        case 3 if isinstance(holder[key], str):
            at = rng.randrange(len(holder[key]) + 1)
            holder[key] = holder[key][:at] + rng.choice(["x", "", "\x00", "\n", "(", "0"]) + holder[key][at + 1 :]
        case 3 if isinstance(holder[key], int | float):
            holder[key] = holder[key] * rng.choice([-1, 2, 0.5]) + rng.choice([-1, 0, 1])
        case _:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return tree.get("root")


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of a JSON tree: what holds it, and its key or index."""
    entries = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in entries:
        yield tree, key
        yield from _places(value)


def read_or_refused(read: Callable[[], T], note: object) -> tuple[T | None, str]:
    """What a reader returns, or the line with which it refuses; soon, in bounded memory, and by no other error.

    Args:
      read: the reader; what it returns is not None.
      note: tells a failure's cause.
    """

    def stop(*_: object) -> None:
        raise TooSlow(note)

    before, peak, since = signal.signal(signal.SIGALRM, stop), peak_resident_bytes(), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 10 * SLOW)  # of a machine that may be busy
    try:
        result, message = read(), ""
        assert result is not None, note
    except (ValueError, OSError) as error:
        result, message = None, str(error)
        assert len(message.splitlines()) == 1, (note, message)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}; {note}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - since < SLOW, note
    assert peak_resident_bytes() - peak < LARGE, note
    return result, message
