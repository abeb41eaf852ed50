"""RULER's needles: lengths kept, each needle in its place once, questions whose answers the context has."""

import re

import pytest

from streamjax.data import ByteTokenizer, load_tokenizer
from streamjax.data.recall.chat_frames import ChatFrame
from streamjax.data.ruler import GROUPS, encode_example, make_example
from streamjax.data.ruler.words import ADJECTIVES, NOISE, NOUNS, essay

BYTES = ByteTokenizer()
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: ([0-9a-f-]+)\.(?=\s|$)")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

# What RULER's table of tasks says: haystack, keys, values of each, keys that are asked for.
PUBLISHED = {
    "niah_single_1": ("noise", 1, 1, 1),
    "niah_single_2": ("essay", 1, 1, 1),
    "niah_single_3": ("essay", 1, 1, 1),
    "niah_multikey_1": ("essay", 4, 1, 1),
    "niah_multikey_2": ("needle", None, 1, 1),
    "niah_multikey_3": ("needle", None, 1, 1),
    "niah_multivalue": ("essay", 1, 4, 1),
    "niah_multiquery": ("essay", 4, 1, 4),
}


def tokens(example, tokenizer, frame=None):
    context, prompts = encode_example(tokenizer, example, frame)
    return len(context) + sum(map(len, prompts)) + sum(turn.answer_tokens for turn in example.turns)


def test_the_tasks_are_rulers():
    assert set(GROUPS["needles"]) == set(PUBLISHED)


@pytest.mark.parametrize("task", PUBLISHED)
@pytest.mark.parametrize("seed", range(3))
def test_a_context_has_the_needles_that_the_paper_counts_and_the_answers(task, seed):
    example = make_example(task, 4000, BYTES, seed)
    haystack, keys, values, asked = PUBLISHED[task]
    opening, _, text = example.context.partition("\n")
    found = [(key, value) for _, key, value in NEEDLE.findall(text)]
    by_key = {key: [v for k, v in found if k == key] for key, _ in found}
    if keys is not None:
        assert len(by_key) == keys
    else:
        assert len(by_key) == len(found) > 20
        assert not NEEDLE.sub("", text).strip()
    assert all(len(some) == values for some in by_key.values())
    wanted = re.search(r"for (.*) mentioned", example.question)[1].replace(", and ", ", ").split(", ")
    assert len(set(wanted)) == asked
    assert list(example.answers) != []
    assert sorted(example.answers) == sorted(value for key in wanted for value in by_key[key])
    assert all(example.context.count(answer) == 1 for answer in example.answers)
    rest = NEEDLE.sub("", text)
    if haystack == "noise":
        assert not rest.replace(NOISE, "").strip()
    if haystack == "essay":
        assert rest.split() == " ".join(essay(len(rest.split()))).split()
    one = len(example.answers) == 1
    assert opening.startswith("A special magic " if one else "Some special magic ")
    assert example.question.startswith("\nWhat is the special" if one else "\nWhat are all the special")
    assert example.answer_tokens == 128


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_3", "niah_multikey_3"])
@pytest.mark.parametrize("kind", ["byte_level", "prefix_space", "byte_fallback", "word_piece"])
def test_lengths_are_kept_for_any_tokenizer(task, kind, tokenizer_folders):
    tokenizer = load_tokenizer(tokenizer_folders[kind])
    frame = ChatFrame("<user> ", " <model> ", " <user> ")
    for chat in (None, frame):
        example = make_example(task, 3000, tokenizer, 1, chat)
        piece = 700 if task == "niah_multikey_3" else 120  # a piece of filler, about
        assert 3000 - piece < tokens(example, tokenizer, chat) <= 3000


def test_an_example_is_its_seed():
    one, again, other = (make_example("niah_multikey_1", 3000, BYTES, seed) for seed in (5, 5, 6))
    assert one == again
    assert one.answers != other.answers
    longer = make_example("niah_multikey_1", 5000, BYTES, 5)  # what is asked does not depend on the length
    assert (longer.question, longer.answers) == (one.question, one.answers)
    assert tokens(longer, BYTES) > 4900


def test_depths_are_spread():
    places = []
    for seed in range(40):
        example = make_example("niah_single_1", 3000, BYTES, seed)
        places.append(example.context.index(example.answers[0]) / len(example.context))
    assert min(places) < 0.2
    assert max(places) > 0.8
    assert 0.35 < sum(places) / 40 < 0.65


def test_words_are_words():
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words)
        assert all(re.fullmatch("[a-z]+", word) for word in words)


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ("niah_single_1", 100, "task 'niah_single_1' needs .* tokens at least, and the length is 100"),
        ("niah", 4096, "unknown task 'niah'; use one of "),
    ],
)
def test_bad_input_is_one_line(task, length, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_example(task, length, BYTES)
    assert "\n" not in str(caught.value)
