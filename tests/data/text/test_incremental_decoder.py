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


def _byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The tokens of SentencePiece for single bytes."""
    return [tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]


SPACED = ["byte_fallback", "first_space", "no_prefix"]


@pytest.mark.parametrize("kind", SPACED)
@given(
    data=st.lists(
        st.sampled_from([b"\n", b"a", "é".encode(), "東".encode(), "😀".encode(), b"\xff", b"\xe6"]), max_size=9
    )
)
def test_a_character_of_byte_tokens_comes_with_its_last_byte(
    kind: str, data: list[bytes], tokenizer_folders: dict[str, Path]
) -> None:
    """Also behind bytes that are no UTF-8, of which each becomes U+FFFD."""
    tokenizer = load_tokenizer(tokenizer_folders[kind])
    decoder, fox = IncrementalDecoder(tokenizer), tokenizer.encode("fox")
    expected = tokenizer.decode(fox)
    assert decoder.push(fox) == expected
    held = 0
    for piece in data:
        text = "".join(decoder.push([i]) for i in _byte_ids(tokenizer, piece))
        bad = piece in (b"\xff", b"\xe6")
        assert text == "\ufffd" * held + ("" if piece == b"\xe6" else "\ufffd" if bad else piece.decode())
        held = int(piece == b"\xe6")
        expected += "\ufffd" if bad else piece.decode()
    assert decoder.flush() == "\ufffd" * held
    assert tokenizer.decode(fox + _byte_ids(tokenizer, b"".join(data))) == expected


@pytest.mark.parametrize("kind", SPACED)
def test_a_line_end_comes_at_once(kind: str, tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizer_folders[kind])
    ids = tokenizer.encode("fox") + _byte_ids(tokenizer, b"\n\n")
    assert _stream(tokenizer, ids, list(range(len(ids))))[-3:] == ["\n", "\n", ""]


def test_unfinished_character_at_the_end() -> None:
    decoder = IncrementalDecoder(ByteTokenizer())
    assert decoder.push([0x61, 0xE6, 0x9D]) == "a"
    assert decoder.flush() == "\ufffd"


@pytest.mark.parametrize("kind", ["byte_fallback", "first_space", "metaspace", "word_piece"])
def test_work_is_linear(kind: str, tokenizer_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tokenizer_folders[kind])
    decode, decoded = tokenizer.decode, 0

    def counting_decode(ids: Iterable[int]) -> str:
        nonlocal decoded
        ids = list(ids)
        decoded += len(ids)
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counting_decode)
    last_byte = tokenizer.encode("\U0001f984")[-1:]
    for ids in (last_byte * 2_000, (tokenizer.encode(TEXTS[0]) * 100)[:2_000]):
        decoded = 0
        _stream(tokenizer, ids, list(range(len(ids))))
        assert decoded < 20 * len(ids)
