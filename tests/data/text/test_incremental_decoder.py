"""Incremental decoding: pieces that add up to the whole, whatever the cuts."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.data import ByteTokenizer, IncrementalDecoder, Tokenizer, load_tokenizer
from tests.data.conftest import KINDS, TEXTS

pytestmark = pytest.mark.quick


def _stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    """The text of each piece of the ids, and of the flush."""
    decoder = IncrementalDecoder(tokenizer)
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [decoder.push(ids[a:b]) for a, b in itertools.pairwise(edges)] + [decoder.flush()]


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_pieces_add_up_to_the_whole(kind: str, tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(tokenizer_folders[kind])
    ids_in = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60)

    @settings(max_examples=100)
    @given(ids_in, st.lists(st.integers(0, 60), max_size=20))
    def any_ids(ids: list[int], cuts: list[int]) -> None:
        assert "".join(_stream(tokenizer, ids, cuts)) == tokenizer.decode(ids)

    @given(st.lists(st.sampled_from([*TEXTS, "東", "é", " ", "  ", "<tool>", "</s>", "#😀"]), max_size=6))
    def any_text(texts: list[str]) -> None:
        ids = tokenizer.encode("".join(texts))
        pieces = _stream(tokenizer, ids, list(range(len(ids))))
        assert "".join(pieces) == tokenizer.decode(ids)
        if kind != "word_piece":
            assert not any("\ufffd" in piece for piece in pieces)

    any_ids()
    any_text()


def test_a_character_comes_whole(tokenizer_folders: dict[str, Path]) -> None:
    for tokenizer in (ByteTokenizer(), load_tokenizer(tokenizer_folders["byte_level"])):
        ids = tokenizer.encode("a\U0001f984b")  # an emoji that no training text held: four byte tokens
        assert len(ids) == 6
        assert _stream(tokenizer, ids, list(range(6)))[1:] == ["a", "", "", "", "\U0001f984", "b", ""]


def test_a_run_of_byte_tokens_is_held_until_it_ends(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizer_folders["byte_fallback"])
    byte = {value: tokenizer._tokenizer.token_to_id(f"<0x{value:02X}>") for value in (0xC3, 0xA9, 0xFF)}
    fox = tokenizer.encode("fox")
    good = [byte[0xC3], byte[0xA9]]
    assert _stream(tokenizer, good + fox, [1, 2])[:2] == ["", ""]
    assert "".join(_stream(tokenizer, good + fox, [1, 2, 3])) == "é fox"
    bad = [*good, byte[0xFF]]  # not UTF-8 as a whole, so none of it is
    assert "".join(_stream(tokenizer, bad + fox, [1, 2, 3])) == tokenizer.decode(bad + fox) == "\ufffd" * 3 + " fox"


def test_unfinished_character_at_the_end() -> None:
    decoder = IncrementalDecoder(ByteTokenizer())
    assert decoder.push([0x61, 0xE6, 0x9D]) == "a"
    assert decoder.flush() == "\ufffd"


@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace", "word_piece"])
def test_work_is_linear(kind: str, tokenizer_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tokenizer_folders[kind])
    decode, decoded = tokenizer.decode, 0

    def counting_decode(ids: Iterable[int]) -> str:
        nonlocal decoded
        ids = list(ids)
        decoded += len(ids)
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counting_decode)
    unfinished = tokenizer.encode("\U0001f984")[-1:]
    for ids in (unfinished * 2_000, (tokenizer.encode(TEXTS[0]) * 100)[:2_000]):
        decoded = 0
        _stream(tokenizer, ids, list(range(len(ids))))
        assert decoded < 20 * len(ids)
