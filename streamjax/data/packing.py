"""From documents to rows of tokens: tokenisation, packing and what a training step wants of a row.

Two ways to fill rows of T tokens. "concat" joins all documents end to end and cuts: no padding, every token is
predicted exactly once, and a row may hold the end of one document and the start of the next, as a stream does. "pack"
puts whole documents side by side (first fit; T5 trained on such rows, arXiv:1910.10683 section 3.1.2), each a segment
with positions of its own that attention keeps apart; the rest of a row is padding.

A stream begins as it does at inference: with BOS where the tokenizer puts one before a text (`adds_bos`), else with the
text. Documents are text: special tokens that are written out in them are not parsed, unless `parse_special`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from streamjax.data.text.tokenizers import Tokenizer

Row = dict[str, np.ndarray]

_PACKING_BINS = 64  # rows that are filled side by side; more of them leave less padding


class TokenizeForRows(grain.transforms.Map):
    """A document to {"targets"}: its ids, then the id that ends a document. For rows that each begin with BOS."""

    def __init__(self, tokenizer: Tokenizer, parse_special: bool = False):
        self._tokenizer, self._parse_special = tokenizer, parse_special
        end = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.bos_id
        self._end = [] if end is None else [end]

    def map(self, element: str) -> Row:
        ids = self._tokenizer.encode(element, parse_special=self._parse_special)
        return {"targets": np.asarray(ids + self._end if ids else [], np.int32)}


class TokenizeForStream(grain.transforms.MapWithIndex):
    """A document to {"tokens", "targets"}, so that documents laid end to end predict all that follows.

    With a BOS the stream is BOS text EOS BOS text EOS ...; with only an EOS it is text EOS text EOS ... .
    """

    def __init__(self, tokenizer: Tokenizer, parse_special: bool = False):
        self._tokenizer, self._parse_special = tokenizer, parse_special

    def map_with_index(self, index: int, element: str) -> Row:
        bos, eos = _bos(self._tokenizer), self._tokenizer.eos_id
        ids = self._tokenizer.encode(element, parse_special=self._parse_special)
        if ids and bos is not None:
            ids = [bos, *ids, *([] if eos is None else [eos]), bos]
        elif ids and eos is not None:
            ids = [*([eos] if index else []), *ids, eos]  # the EOS before is that of the document before
        return _shifted(ids)


class TokenizeForSegments(grain.transforms.Map):
    """A document to {"tokens", "targets"}: BOS and its ids, each with the id that follows."""

    def __init__(self, tokenizer: Tokenizer, parse_special: bool = False):
        self._tokenizer, self._parse_special = tokenizer, parse_special

    def map(self, element: str) -> Row:
        bos, eos = _bos(self._tokenizer), self._tokenizer.eos_id
        ids = self._tokenizer.encode(element, parse_special=self._parse_special)
        if ids:
            ids = [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]
        return _shifted(ids)


class CutIntoSegments(grain.experimental.FlatMapTransform):
    """A document's tokens to pieces of at most T; the last target of a piece is the first token of the next."""

    def __init__(self, seq_len: int):
        self._seq_len = seq_len

    def flat_map(self, element: Row) -> Sequence[Row]:
        starts = range(0, len(element["tokens"]), self._seq_len)
        return [{key: value[start : start + self._seq_len] for key, value in element.items()} for start in starts]


class FinishRow(grain.transforms.Map):
    """What grain's packing gives to the row of the contract; see `concat_rows` and `pack_rows`."""

    def __init__(self, bos_id: int | None, segments: bool):
        self._bos_id = bos_id
        self._segments = segments

    def map(self, element: Row) -> Row:
        targets, segment_ids = element["targets"], element["targets_segment_ids"]
        weights = (segment_ids > 0).astype(np.float32)
        if self._bos_id is None:
            tokens = element["tokens"]
        else:
            tokens = _moved_right(self._bos_id, targets)
        row = {"tokens": tokens, "targets": targets, "weights": weights}
        if self._segments:
            row |= {"segment_ids": segment_ids, "positions": element["targets_positions"]}
        return row


def concat_rows(
    documents: grain.MapDataset,
    tokenizer: Tokenizer,
    seq_len: int,
    bos_each_row: bool,
    without: int | None = None,
    parse_special: bool = False,
) -> Any:
    """Documents joined end to end and cut into rows.

    Args:
      documents: texts; one that becomes no tokens is passed over.
      tokenizer: its BOS and EOS join the documents.
      seq_len: T.
      bos_each_row: every row is BOS and T - 1 tokens of the stream, and the stream itself holds no BOS, as at
        inference, where BOS comes once, at the start. Otherwise every document begins with BOS, wherever that falls.
        A tokenizer that adds no BOS has none in either.
      without: after so many documents without tokens, one behind the other, reading ends in a ValueError. Documents
        that repeat for ever would else be read for ever. Never where None.
      parse_special: whether special tokens that are written out in a document are those tokens.

    Returns:
      An IterDataset of rows: tokens, targets int32 [T], weights float32 [T]. Of a finite set the last row is padded
      with weight 0.
    """
    begin = _bos(tokenizer) if bos_each_row else None
    if begin is not None:
        tokens = documents.map(TokenizeForRows(tokenizer, parse_special))
        lengths = {"targets": seq_len}
    else:
        tokens = documents.map_with_index(TokenizeForStream(tokenizer, parse_special))
        lengths = {"tokens": seq_len, "targets": seq_len}
    rows = _ConcatThenSplit(_WithTokens(_read(tokens), without, tokenizer.name), length_struct=lengths)
    return rows.map(FinishRow(begin, segments=False))


def pack_rows(
    documents: grain.MapDataset,
    tokenizer: Tokenizer,
    seq_len: int,
    without: int | None = None,
    parse_special: bool = False,
) -> Any:
    """Documents side by side in rows, first fit, each a segment of its own.

    Args:
      documents: texts; one that becomes no tokens is passed over.
      tokenizer: its BOS and EOS begin and end every document.
      seq_len: T; a longer document becomes several segments.
      without: as for `concat_rows`.
      parse_special: whether special tokens that are written out in a document are those tokens.

    Returns:
      An IterDataset of rows: tokens, targets int32 [T], weights float32 [T] (0 for padding), segment_ids int32 [T]
      (from 1; 0 is padding) and positions int32 [T], from 0 in every segment.
    """
    segments = documents.map(TokenizeForSegments(tokenizer, parse_special))
    tokens = _WithTokens(_read(segments), without, tokenizer.name)
    pieces = grain.experimental.FlatMapIterDataset(tokens, CutIntoSegments(seq_len))
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={"tokens": seq_len, "targets": seq_len},
        num_packing_bins=_PACKING_BINS,
        shuffle_bins=False,
    )
    return packed.map(FinishRow(None, segments=True))


def _bos(tokenizer: Tokenizer) -> int | None:
    """The id that begins a text, where the model expects one."""
    return tokenizer.bos_id if tokenizer.adds_bos else None


def _read(dataset: grain.MapDataset) -> Any:
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def _shifted(ids: Sequence[int]) -> Row:
    array = np.asarray(ids, np.int32)
    return {"tokens": array[:-1], "targets": array[1:]}


def _moved_right(first: int, row: Int[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
    """The row moved one to the right, behind `first`."""
    return np.concatenate([np.asarray([first], row.dtype), row[:-1]])


class _WithTokens(grain.IterDataset):
    """The documents that have tokens, in their order. Its state is its parent's."""

    def __init__(self, documents: Any, most: int | None, tokenizer: str):
        super().__init__(documents)
        self._most, self._tokenizer = most, tokenizer

    def __iter__(self) -> "_WithTokensIterator":
        return _WithTokensIterator(iter(self._parent), self._most, self._tokenizer)


class _WithTokensIterator(grain.DatasetIterator):
    def __init__(self, documents: grain.DatasetIterator, most: int | None, tokenizer: str):
        super().__init__(documents)
        self._most, self._tokenizer = most, tokenizer

    def __next__(self) -> Row:
        empty = 0
        while True:
            row = next(self._parent)
            if len(row["targets"]):
                return row
            empty += 1
            if self._most is not None and empty >= self._most:
                raise ValueError(
                    f"no document has a token by tokenizer {self._tokenizer!r}, after {empty} that were read one "
                    "behind the other: choose other text, or another tokenizer"
                )

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._parent.set_state(dict(state))


class _ConcatThenSplit(grain.experimental.ConcatThenSplitIterDataset):
    """Grain's, with a state that survives JSON.

    Grain tells "no remainder" by a slice equal to the tuple (-1, -1), and its own Orbax handler writes states as JSON,
    which turns tuples into lists: such a state would resume in the wrong place.
    """

    def __iter__(self) -> "_TupleSlices":
        return _TupleSlices(super().__iter__())


class _TupleSlices(grain.DatasetIterator):
    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        slices = {key: tuple(limits) for key, limits in state["remainder_slices"].items()}
        self._parent.set_state(dict(state, remainder_slices=slices))
