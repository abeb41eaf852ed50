"""Rows of tokens against plain loops over the documents."""

from pathlib import Path

import grain
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from streamjax.data import ByteTokenizer, load_tokenizer
from streamjax.data.packing import concat_rows, pack_rows

pytestmark = pytest.mark.quick

BOS, EOS = 256, 257
DOCUMENTS = st.lists(st.text("abcdeé", max_size=40), min_size=1, max_size=12)


class WithoutBos(ByteTokenizer):
    """As Qwen: documents end, and nothing begins them."""

    bos_id = None


class AddsNoBos(ByteTokenizer):
    """As SmolLM2: there is a BOS, of which plain texts know nothing."""

    adds_bos = False


class WithoutEither(ByteTokenizer):
    """A bare vocabulary."""

    bos_id = None
    eos_id = None


def _begin(tokenizer: ByteTokenizer) -> int | None:
    return tokenizer.bos_id if tokenizer.adds_bos else None


def _rows(dataset: grain.IterDataset) -> list[dict[str, np.ndarray]]:
    rows = list(dataset)
    for row in rows:
        assert {row[key].dtype for key in row} <= {np.dtype(np.int32), np.dtype(np.float32)}
        assert row["weights"].dtype == np.float32
    return rows


@given(DOCUMENTS, st.integers(2, 17))
def test_concat_with_bos_in_each_row(documents: list[str], seq_len: int) -> None:
    rows = _rows(concat_rows(grain.MapDataset.source(documents), ByteTokenizer(), seq_len, bos_each_row=True))
    stream = [token for text in documents if text for token in [*text.encode(), EOS]]
    for index in range(0, len(stream), seq_len):
        row, targets = rows.pop(0), stream[index : index + seq_len]
        assert row["targets"].shape == row["tokens"].shape == row["weights"].shape == (seq_len,)
        assert row["targets"][: len(targets)].tolist() == targets
        assert row["tokens"][: len(targets)].tolist() == [BOS, *targets[:-1]]
        assert row["weights"].tolist() == [1.0] * len(targets) + [0.0] * (seq_len - len(targets))
    assert all(row["weights"].sum() == 0 for row in rows)


@pytest.mark.parametrize("bos_each_row", [False, True])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WithoutBos(), AddsNoBos(), WithoutEither()])
@given(documents=DOCUMENTS, seq_len=st.integers(2, 17))
def test_concat_of_one_stream(tokenizer: ByteTokenizer, bos_each_row: bool, documents: list[str], seq_len: int) -> None:
    """A tokenizer that adds no BOS makes the same rows with `bos_each_row`."""
    bos_each_row &= _begin(tokenizer) is None
    rows = _rows(concat_rows(grain.MapDataset.source(documents), tokenizer, seq_len, bos_each_row))
    tokens = np.concatenate([row["tokens"][row["weights"] > 0] for row in rows] or [[]]).tolist()
    targets = np.concatenate([row["targets"][row["weights"] > 0] for row in rows] or [[]]).tolist()
    texts = [list(text.encode()) for text in documents if text]
    if _begin(tokenizer) is not None:
        expected = [token for text in texts for token in [BOS, *text, EOS]]
        assert tokens == expected
        assert targets == [*expected[1:], BOS] if expected else targets == []
    elif tokenizer.eos_id is not None:
        stream = [token for text in texts for token in [*text, EOS]]
        if not documents[0]:
            stream = [EOS, *stream]  # the stream has begun before
        assert tokens == stream[:-1]
        assert targets == stream[1:]
    else:
        assert tokens == [token for text in texts for token in text[:-1]]
        assert targets == [token for text in texts for token in text[1:]]
    assert all(row["weights"].all() for row in rows[:-1])


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WithoutBos(), AddsNoBos(), WithoutEither()])
@given(documents=DOCUMENTS, seq_len=st.integers(2, 17))
def test_pack(tokenizer: ByteTokenizer, documents: list[str], seq_len: int) -> None:
    rows = _rows(pack_rows(grain.MapDataset.source(documents), tokenizer, seq_len))
    pieces = []
    for text in documents:
        bos, eos = ([] if i is None else [i] for i in (_begin(tokenizer), tokenizer.eos_id))
        ids = [*bos, *text.encode(), *eos] if text else []
        for start in range(0, len(ids) - 1, seq_len):
            stop = min(start + seq_len, len(ids) - 1)
            pieces.append((ids[start:stop], ids[start + 1 : stop + 1]))
    found = []
    for row in rows:
        segment_ids = row["segment_ids"]
        count = segment_ids.max()
        assert (row["weights"] == (segment_ids > 0)).all()
        used = (segment_ids > 0).sum()
        assert (np.diff(segment_ids[:used]) >= 0).all()  # segments lie side by side, padding comes last
        for segment in range(1, count + 1):
            inside = segment_ids == segment
            assert row["positions"][inside].tolist() == list(range(inside.sum()))
            found.append((row["tokens"][inside].tolist(), row["targets"][inside].tolist()))
    assert sorted(found) == sorted(pieces)


def test_pack_fills_rows_first_fit() -> None:
    texts = ["a" * length for length in (6, 3, 5, 2, 1)]  # and one token more each: 7, 4, 6, 3, 2 of 10
    rows = _rows(pack_rows(grain.MapDataset.source(texts), ByteTokenizer(), 10))
    lengths = [np.bincount(row["segment_ids"])[1:].tolist() for row in rows]
    assert lengths == [[7, 3], [4, 6], [2]]


@pytest.mark.parametrize("rows_of", ["concat", "concat with BOS", "pack"])
def test_rows_begin_as_a_stream_does(rows_of: str, tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    """With BOS where the tokenizer puts one before a text, and nowhere else."""
    for adds_bos in (False, True):
        inner = tokenizers.Tokenizer.from_file(str(tokenizer_folders["byte_level"] / "tokenizer.json"))
        if adds_bos:
            special = [("<s>", inner.token_to_id("<s>"))]
            inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=special)
        inner.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.adds_bos is adds_bos
        documents = grain.MapDataset.source(["The fox", "jumps"])
        if rows_of == "pack":
            row = _rows(pack_rows(documents, tokenizer, 12))[0]
        else:
            row = _rows(concat_rows(documents, tokenizer, 12, bos_each_row=rows_of == "concat with BOS"))[0]
        begin = tokenizer.encode("The fox", add_bos=adds_bos)
        assert row["tokens"][: len(begin)].tolist() == begin
        assert (tokenizer.bos_id in row["tokens"]) is adds_bos


def test_documents_are_text(tokenizer_folders: dict[str, Path]) -> None:
    """Special tokens that are written out in them are not parsed, unless they are asked to be."""
    tokenizer, text = load_tokenizer(tokenizer_folders["byte_level"]), "The</s><s>fox"
    for make in (pack_rows, lambda *a, **k: concat_rows(*a, bos_each_row=False, **k)):
        for parse in (False, True):
            [row] = _rows(make(grain.MapDataset.source([text]), tokenizer, 40, parse_special=parse))
            found = row["tokens"][row["weights"] > 0].tolist()
            assert found == tokenizer.encode(text, parse_special=parse)
            assert (tokenizer.bos_id in found) is parse
