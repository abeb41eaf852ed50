"""Rows of tokens against plain loops over the documents."""

from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjax.data import ByteTokenizer, HFTokenizer, load_tokenizer
from streamjax.data.packing import concat_rows, pack_rows

pytestmark = pytest.mark.quick

BOS, EOS = 256, 257
DOCUMENTS = st.lists(st.text("abcdeé", max_size=40), min_size=1, max_size=12)


class WithoutBos(ByteTokenizer):
    """As Qwen: documents end, and nothing begins them."""

    bos_id = None


class WithoutEither(ByteTokenizer):
    """A bare vocabulary."""

    bos_id = None
    eos_id = None


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


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WithoutBos(), WithoutEither()])
@given(documents=DOCUMENTS, seq_len=st.integers(2, 17))
def test_concat_of_one_stream(tokenizer: ByteTokenizer, documents: list[str], seq_len: int) -> None:
    rows = _rows(concat_rows(grain.MapDataset.source(documents), tokenizer, seq_len, bos_each_row=False))
    tokens = np.concatenate([row["tokens"][row["weights"] > 0] for row in rows] or [[]]).tolist()
    targets = np.concatenate([row["targets"][row["weights"] > 0] for row in rows] or [[]]).tolist()
    texts = [list(text.encode()) for text in documents if text]
    if tokenizer.bos_id is not None:
        expected = [token for text in texts for token in [BOS, *text, EOS]]
        assert tokens == expected
        assert targets == [*expected[1:], BOS] if expected else targets == []
    elif tokenizer.eos_id is not None:
        expected = [token for text in texts for token in [*text, EOS]]
        assert targets == expected
        assert tokens == [EOS, *expected[:-1]] if expected else tokens == []
    else:
        assert tokens == [token for text in texts for token in text[:-1]]
        assert targets == [token for text in texts for token in text[1:]]
    assert all(row["weights"].all() for row in rows[:-1])


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WithoutBos(), WithoutEither()])
@given(documents=DOCUMENTS, seq_len=st.integers(2, 17))
def test_pack(tokenizer: ByteTokenizer, documents: list[str], seq_len: int) -> None:
    rows = _rows(pack_rows(grain.MapDataset.source(documents), tokenizer, seq_len))
    pieces = []
    for text in documents:
        bos, eos = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
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


def test_tokens_of_a_real_tokenizer(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizer_folders["byte_level"])
    assert isinstance(tokenizer, HFTokenizer)
    [row] = _rows(concat_rows(grain.MapDataset.source(["The fox"]), tokenizer, 20, bos_each_row=True))
    ids = [*tokenizer.encode("The fox"), tokenizer.eos_id]
    assert row["targets"][: len(ids)].tolist() == ids
    assert row["tokens"][: len(ids)].tolist() == [tokenizer.bos_id, *ids[:-1]]


def test_a_tokenizer_without_bos_cannot_begin_rows() -> None:
    with pytest.raises(ValueError, match="has no BOS token: set bos_each_row=False"):
        concat_rows(grain.MapDataset.source(["a"]), WithoutBos(), 8, bos_each_row=True)
