"""Tasks beside RULER, in kind: SCBench's shared contexts, InfiniteBench's retrieval, MRCR's coreference.

"scbench_kv", "scbench_prefix_suffix" and "scbench_vt" (2412.10319) ask five questions about one context. "passkey",
"number_string" and "kv" are InfiniteBench's (2402.13718). "mrcr" (2409.12640) asks for one of several texts that were
written at the same request. Words and texts are our own.
"""

from __future__ import annotations

import random
import string

from streamjax.data.ruler import words
from streamjax.data.ruler.example import Example, Turn

TURNS = 5
ORDINALS = ("first", "second", "third", "fourth")
_FORMS = ("short poem", "riddle", "news report", "letter", "recipe", "toast")
_WRITTEN = ("bright", "old", "quiet", "broken", "distant", "warm", "narrow", "golden", "heavy", "gentle")


def make_pass_key(task: str, seed: int, length: int, filler: int) -> Example:
    """A pass key of five digits, or a string of ten digits in runs, in noise."""
    del length
    draw = random.Random(f"{task} {seed}")
    if task == "passkey":
        what, value, budget = "pass key", words.number(draw, 5), 6
    else:  # digits in runs, which are hard to tell apart
        what, budget = "sequence of digits", 12
        value = "".join(draw.choice(string.digits) * draw.randint(1, 4) for _ in range(10))[:10]
    lines = [words.NOISE] * filler
    fact = f"The {what} is {value}. Remember it. {value} is the {what}."
    lines.insert(int(draw.random() * (filler + 1)), fact)
    opening = f"There is an important {what} hidden in the text below. Find it and remember it.\n"
    turn = Turn(f"\nWhat is the {what}?", f" The {what} is", (value,), budget)
    return Example(task, opening + "\n".join(lines), (turn,))


def make_key_value(task: str, seed: int, length: int, filler: int) -> Example:
    """A JSON object of UUIDs, and the values of one key, or of five keys one after another."""
    del length
    draw = random.Random(f"{task} {seed}")
    turns = 1 if task == "kv" else TURNS
    depths = [draw.random() for _ in range(turns)]
    pairs = [(words.unique_id(draw), words.unique_id(draw)) for _ in range(max(filler, turns))]
    asked = _distinct(depths, len(pairs))
    context = "Below is a JSON object of keys and values. Remember which value each key has.\n{"
    context += ",\n".join(f'"{key}": "{value}"' for key, value in pairs) + "}"
    return Example(
        task,
        context,
        tuple(
            Turn(f'\nWhat is the value of the key "{pairs[i][0]}"?', ' Its value is "', (pairs[i][1],), 50)
            for i in asked
        ),
    )


def make_prefix_suffix(task: str, seed: int, length: int, filler: int) -> Example:
    """A list of strings; which one begins and ends so? Others share the beginning, or the end."""
    del length
    draw = random.Random(f"{task} {seed}")
    depths = [draw.random() for _ in range(TURNS)]
    alphabet = string.ascii_lowercase + string.digits

    def part() -> str:
        return "".join(draw.choices(alphabet, k=6))

    beginnings, endings = [part() for _ in range(8)], [part() for _ in range(8)]
    ends = [(a, b) for a in beginnings for b in endings]
    draw.shuffle(ends)
    # Past 64 strings the pairs of a beginning and an end come anew, so that each stays one string's alone.
    while len(ends) < max(filler, TURNS):
        ends.append((part(), part()) if len(ends) % 2 else (beginnings[len(ends) % 8], part()))
    ends = ends[: max(filler, TURNS)]
    lines = [f"{a}{part()}{part()}{b}" for a, b in ends]
    context = "Below is a list of strings, one on each line. Remember them.\n" + "\n".join(lines)
    turns = []
    for i in _distinct(depths, len(lines)):
        question = f'\nWhich string of the list begins with "{ends[i][0]}" and ends with "{ends[i][1]}"?'
        turns.append(Turn(question, ' It is "', (lines[i],), 32))
    return Example(task, context, tuple(turns))


def _distinct(depths: list[float], count: int) -> list[int]:
    """A place for each depth, no place twice."""
    places: list[int] = []
    for depth in depths:
        place = int(depth * count)
        while place in places:
            place = (place + 1) % count
        places.append(place)
    return places


def make_coreference(task: str, seed: int, length: int, filler: int) -> Example:
    """A conversation of requests for short texts, some of them made four times; which one was the second?"""
    del length
    draw = random.Random(f"{task} {seed}")
    mark = "".join(draw.choices(string.ascii_letters + string.digits, k=8))
    asked = f"{draw.choice(_FORMS)} about a {draw.choice(words.NOUNS)}"
    which = draw.randrange(len(ORDINALS))
    places = sorted(draw.random() for _ in ORDINALS)
    wanted = [_text(draw) for _ in ORDINALS]
    requests: list[tuple[str, str]] = []
    while len(requests) < filler:
        other = f"{draw.choice(_FORMS)} about a {draw.choice(words.NOUNS)}"
        if other != asked:
            requests.append((other, _text(draw)))
    for place, text in zip(reversed(places), reversed(wanted), strict=True):
        requests.insert(int(place * (filler + 1)), (asked, text))
    context = "Below is a conversation in which one side asks for short texts and the other writes them.\n\n"
    context += "\n\n".join(f"Request: write a {request}.\nText: {text}" for request, text in requests)
    question = f"\n\nWrite {mark}, and behind it the {ORDINALS[which]} {asked}, to the letter."
    turn = Turn(question, "", (f"{mark} {wanted[which]}",), 80, "ratio")
    return Example(task, context, (turn,))


def _text(draw: random.Random) -> str:
    lines = []
    for _ in range(3):
        subject = f"{draw.choice(_WRITTEN)} {draw.choice(words.NOUNS)}"
        lines.append(f"The {subject} will {draw.choice(words.VERBS)} the {draw.choice(words.NOUNS)}.")
    return " ".join(lines)
