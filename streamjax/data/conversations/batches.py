"""Batches of prepared examples: conversations side by side in rows or one a row, pairs, and prompts by their number."""

from __future__ import annotations

import functools
from typing import Any

import grain
import numpy as np
from einops import rearrange

from streamjax.data.config import DataConfig
from streamjax.data.conversations.prepared import PreparedExamples, text_row

Batch = dict[str, np.ndarray]
_PACKING_BINS = 64  # rows that are filled side by side; more of them leave less padding


def example_batches(
    config: DataConfig, examples: PreparedExamples, count: int, *, index: int = 0, shards: int = 1
) -> Any:
    """Batches to train on, as a Grain dataset whose iterators can be saved and restored.

    Args:
      config: `packing`, `shuffle_seed` and `epochs` count here.
      examples: what `prepare_examples` returned.
      count: rows of a batch, of pairs and prompts that many of these.
      index, shards: which of several processes this is; each has its own examples.

    Returns:
      Of conversations dicts of tokens, targets int32 [B, T] and weights float32 [B, T], with "pack" segment_ids and
      positions int32 [B, T] too. Of pairs the same with rows 2 i and 2 i + 1 chosen and rejected, and `example` int32
      [B / 2], the pair's number. Of prompts `example` int32 [B] alone.

    Raises:
      ValueError: fewer examples than processes, or than a batch of one epoch needs.
    """
    if len(examples) < shards:
        raise ValueError(f"data source {config.source!r} has {len(examples)} examples for {shards} processes")
    rows = grain.MapDataset.source(_Rows(config, examples))
    if config.shuffle_seed is not None:
        rows = rows.shuffle(config.shuffle_seed)
    if shards > 1:
        rows = rows[index::shards]
    return _batched(config, rows.repeat(config.epochs), count, drop_remainder=True)


def held_out_batches(config: DataConfig, examples: PreparedExamples, count: int) -> Any:
    """One pass over conversations or pairs in their order, the last batch filled with rows of weight 0."""
    return _batched(config, grain.MapDataset.source(_Rows(config, examples)), count, drop_remainder=False)


class _Rows:
    """One element an example, by its number."""

    def __init__(self, config: DataConfig, examples: PreparedExamples):
        self._length, self._texts = config.seq_len, examples.texts
        self._kind, self._packed = config.format, config.packing == "pack"

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Batch:
        number = {"example": np.asarray(index, np.int32)}
        if self._kind == "prompts":
            return number
        texts = self._texts[index]
        if self._packed:
            [text] = texts
            return {
                "tokens": text.ids[:-1],
                "targets": text.ids[1:],
                "weights": text.learnt[1:].astype(np.float32),
            }
        rows = [text_row(text, self._length) for text in texts]
        if self._kind == "conversations":
            return rows[0]
        return number | {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class _FinishPacked(grain.transforms.Map):
    """What Grain's packing gives to a row with segments."""

    def map(self, element: Batch) -> Batch:
        names = ("tokens", "targets", "weights")
        extra = {"segment_ids": element["tokens_segment_ids"], "positions": element["tokens_positions"]}
        return {name: element[name] for name in names} | extra


class _FinishPairs(grain.transforms.Map):
    """The two rows of each pair one behind the other."""

    def map(self, element: Batch) -> Batch:
        return {name: rearrange(x, "b two t -> (b two) t") if x.ndim == 3 else x for name, x in element.items()}


def _batched(config: DataConfig, rows: Any, count: int, *, drop_remainder: bool) -> Any:
    dataset = rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if config.format == "conversations" and config.packing == "pack":
        lengths = dict.fromkeys(("tokens", "targets", "weights"), config.seq_len)
        dataset = grain.experimental.FirstFitPackIterDataset(
            dataset, length_struct=lengths, num_packing_bins=_PACKING_BINS, shuffle_bins=False
        ).map(_FinishPacked())
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=count)
    dataset = dataset.batch(count, drop_remainder=True) if drop_remainder else dataset.batch(count, batch_fn=fill)
    return dataset.map(_FinishPairs()) if config.format == "preferences" else dataset
