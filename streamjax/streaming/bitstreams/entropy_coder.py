"""Symbols of many lanes as words of sixteen bits, as few as their tables of frequencies allow: interleaved rANS.

Asymmetric numeral systems (Duda, 1311.2540) do what arithmetic coding does, with one number as their whole state. Each
lane has a state and a table of its own, and all lanes take a step together, so that numpy does the work. What lanes put
out goes into one list of words; whoever reads backwards knows from the states alone whose the next words are.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64, UInt16, UInt32

PRECISION = 12  # bits: frequencies of a table sum to 2^12
_LOW = 1 << 16  # states lie in [2^16, 2^32)


def table(counts: Float[np.ndarray, "*N S"]) -> UInt16[np.ndarray, "*N S"]:
    """Frequencies that sum to 4,096, of which each is at least 1, nearly in proportion to counts of S symbols."""
    symbols = counts.shape[-1]
    total = counts.sum(axis=-1, keepdims=True)
    shares = np.where(total > 0, counts / np.where(total > 0, total, 1), 1 / symbols)
    found = 1 + np.floor(shares * ((1 << PRECISION) - symbols)).astype(np.int64)
    best = np.argmax(found, axis=-1)[..., None]
    rest = (1 << PRECISION) - found.sum(axis=-1, keepdims=True)
    np.put_along_axis(found, best, np.take_along_axis(found, best, axis=-1) + rest, axis=-1)
    return found.astype(np.uint16)


def encode(
    symbols: Int64[np.ndarray, "T N"], tables: UInt16[np.ndarray, "N S"]
) -> tuple[UInt32[np.ndarray, " N"], UInt16[np.ndarray, " W"]]:
    """T symbols of each of N lanes as the lanes' last states and a list of words."""
    frequencies = tables.astype(np.uint64)
    starts = np.cumsum(frequencies, axis=1) - frequencies
    lanes = np.arange(len(tables))
    state, words = np.full(len(tables), _LOW, np.uint64), []
    for row in symbols[::-1]:
        frequency, start = frequencies[lanes, row], starts[lanes, row]
        full = state >= frequency << np.uint64(32 - PRECISION)
        words.append((state[full] & np.uint64(0xFFFF)).astype(np.uint16))
        state = np.where(full, state >> np.uint64(16), state)
        state = ((state // frequency) << np.uint64(PRECISION)) + state % frequency + start
    return state.astype(np.uint32), np.concatenate(words[::-1]) if words else np.zeros(0, np.uint16)


def decode(
    state: UInt32[np.ndarray, " N"], words: UInt16[np.ndarray, " W"], tables: UInt16[np.ndarray, "N S"], length: int
) -> Int64[np.ndarray, "T N"]:
    """`length` symbols of each lane.

    Raises:
      ValueError: words that are not those of so many symbols.
    """
    frequencies = tables.astype(np.uint64)
    ends = np.cumsum(frequencies, axis=1)
    lanes, now, at = np.arange(len(tables)), state.astype(np.uint64), 0
    found = np.zeros((length, len(tables)), np.int64)
    for row in found:
        place = now & np.uint64((1 << PRECISION) - 1)
        low, high = np.zeros(len(tables), np.int64), np.full(len(tables), tables.shape[1] - 1)
        while (low < high).any():  # the first symbol that ends behind the place
            middle = (low + high) // 2
            behind = ends[lanes, middle] > place
            low, high = np.where(behind, low, middle + 1), np.where(behind, middle, high)
        row[:] = np.minimum(low, tables.shape[1] - 1)
        frequency = frequencies[lanes, row]
        now = frequency * (now >> np.uint64(PRECISION)) + place - (ends[lanes, row] - frequency)
        empty = now < _LOW
        count = int(empty.sum())
        if at + count > len(words):
            raise ValueError("the bits end before the tokens do")
        now[empty] = (now[empty] << np.uint64(16)) | words[at : at + count]
        at += count
    if at != len(words) or (now != _LOW).any():
        raise ValueError("the bits are not those of these tokens")
    return found
