"""RULER's tasks of counting (2404.06654): the ten most common words of a list, the three most frequent of a code.

As published. "cwe": ten words stand 30 times in a numbered list, the others 3 times (6 and once for lengths below
4,096), behind a solved example; 120 tokens for an answer. "fwe": coded words of six letters whose counts fall as rank
to the power of -2; the commonest is "..." and does not count; 50 tokens.
"""

from __future__ import annotations

import math
import random
import string

from streamjax.data.ruler.example import Example, Turn
from streamjax.data.ruler.words import distinct_words

COMMON, FEW = 10, 20  # common words, and words in a solved example of a short context
CWE_TOKENS, FWE_TOKENS = 120, 50
_WORDS_A_VOCABULARY = 50  # tokens of the length for a word of the code


def make_common_words(task: str, seed: int, length: int, filler: int) -> Example:
    """An example with so many rare words."""
    draw = random.Random(f"{task} {seed}")
    short = length < 4096
    words, often, seldom = (FEW, 3, 1) if short else (2 * FEW, 10, 3)
    listed, common = _list(draw, words, often, seldom)
    solved = _told(listed) + _ASKED + _BEGUN + " " + _numbered(common) + "\n"
    often, seldom = (6, 1) if short else (30, 3)
    listed, common = _list(draw, COMMON + filler, often, seldom)
    return Example(task, solved + _told(listed), (Turn(_ASKED, _BEGUN, tuple(common), CWE_TOKENS),))


_ASKED = "\nQuestion: What are the 10 most common words in the above list?"
_BEGUN = " Answer: The top 10 words that appear most often in the list are:"


def _told(listed: str) -> str:
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{listed}"
    )


def _list(draw: random.Random, words: int, often: int, seldom: int) -> tuple[str, list[str]]:
    drawn = distinct_words(draw, words)
    entries = drawn[:COMMON] * often + drawn[COMMON:] * seldom
    draw.shuffle(entries)
    return _numbered(entries), drawn[:COMMON]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


def make_frequent_words(task: str, seed: int, length: int, filler: int) -> Example:
    """An example with about so many words."""
    draw = random.Random(f"{task} {seed}")
    vocabulary: dict[str, None] = {"...": None}
    while len(vocabulary) < max((length - FWE_TOKENS) // _WORDS_A_VOCABULARY, 5):
        vocabulary["".join(draw.choices(string.ascii_lowercase, k=6))] = None
    ranked = list(vocabulary)
    text: list[str] = []
    for rank, word in enumerate(ranked, 1):
        text += [word] * int(filler / rank**2 / (math.pi**2 / 6))
    draw.shuffle(text)
    context = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(text)}"
    )
    question = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?"
    )
    begun = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return Example(task, context, (Turn(question, begun, tuple(ranked[1:4]), FWE_TOKENS),))
