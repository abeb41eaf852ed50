"""The input pipeline: documents to batches, with Grain, so that its place can be saved and resumed exactly."""

import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from streamjax.data.config import DataConfig
from streamjax.data.conversations.batches import example_batches, held_out_batches
from streamjax.data.conversations.prepared import PreparedExamples, prepare_examples
from streamjax.data.packing import concat_rows, pack_rows
from streamjax.data.recall.training_rows import RecallRows, open_recall
from streamjax.data.sources import DocumentSource, open_source
from streamjax.data.text.tokenizers import Tokenizer, load_tokenizer

Batch = dict[str, np.ndarray]

_EVAL_SEED = 0
_MOST_SHUFFLED_ROWS = 4096  # the buffer is filled before the first batch comes


def make_train_iterator(
    config: DataConfig, *, shard: grain.sharding.ShardOptions | None = None, split: str = "train"
) -> grain.DatasetIterator:
    """Batches to train on, in an order that depends on nothing but the arguments.

    With "streams" row i of every batch continues row i of the batch before it. The documents are dealt out to the
    rows, anew in every epoch of a row where they are shuffled.

    Args:
      config: what to read.
      shard: which of several processes this is, e.g. `grain.sharding.ShardByJaxProcess()`. Each reads its own
        documents and yields batch_size / shard_count rows.
      split: which documents.

    Returns:
      A Grain iterator of dicts of numpy arrays: tokens, targets int32 [B, T], weights float32 [B, T]; with "pack" also
      segment_ids and positions int32 [B, T]. `get_state()` gives a dict that JSON can hold; after `set_state(state)`,
      also in a new process, the same batches follow. A last batch that is not full is dropped.

    Raises:
      ValueError: nothing to read (see `open_source`), a tokenizer that does not fit, rows or documents that cannot be
        shared out. While it is iterated over: none of the documents becomes a token, or one cannot be read any more.
    """
    index, count = _shard(shard)
    share = _share(config.batch_size, count)
    if config.format != "text":
        return train_on_examples(config, prepare_examples(config, split), config.batch_size, shard=shard)
    tokenizer, source = _open(config, split)
    if config.packing == "streams":
        _require_documents(config, source, split, config.batch_size, "streams")
        streams = [
            _token_rows(config, tokenizer, source, config.shuffle_seed, config.epochs, row, config.batch_size)
            for row in range(index * share, (index + 1) * share)
        ]
        batches = grain.experimental.ZipIterDataset(streams, strict=False).map(_stack)
    else:
        _require_documents(config, source, split, count, "processes")
        rows = _token_rows(config, tokenizer, source, config.shuffle_seed, config.epochs, index, count)
        window = min(config.shuffle_tokens // config.seq_len, _MOST_SHUFFLED_ROWS)
        window = 0 if isinstance(source, RecallRows) else window
        if config.shuffle_seed is not None and window > 1:
            rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=window, seed=config.shuffle_seed)
        batches = rows.batch(share, drop_remainder=True)
    return _prefetched(config, batches)


def train_on_examples(
    config: DataConfig,
    examples: PreparedExamples,
    rows: int,
    *,
    shard: grain.sharding.ShardOptions | None = None,
) -> grain.DatasetIterator:
    """Batches of examples that are prepared: `rows` rows over all processes, of pairs half as many, else as
    `make_train_iterator`.
    """
    index, count = _shard(shard)
    share = _share(rows, count) // (2 if config.format == "preferences" else 1)
    return _prefetched(config, example_batches(config, examples, share, index=index, shards=count))


def evaluate_on_examples(
    config: DataConfig,
    examples: PreparedExamples,
    num_batches: int,
    *,
    shard: grain.sharding.ShardOptions | None = None,
) -> Iterable[Batch]:
    """The first batches of one pass over examples that are prepared, else as `make_eval_batches`."""
    index, count = _shard(shard)
    share = _share(config.batch_size, count)
    pairs = 2 if config.format == "preferences" else 1
    batches = held_out_batches(config, examples, config.batch_size // pairs)
    batches = grain.experimental.LimitIterDataset(batches, num_batches)
    return _Shares(batches, index * share, share, pairs)


class _Shares:
    """One process's rows of batches."""

    def __init__(self, batches: Iterable[Batch], first: int, rows: int, pairs: int):
        self._batches = batches
        self._mine = {
            name: slice(first // size, (first + rows) // size) for name, size in (("example", pairs), ("", 1))
        }

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            yield {name: value[self._mine.get(name, self._mine[""])] for name, value in batch.items()}


def _prefetched(config: DataConfig, batches: Any) -> grain.DatasetIterator:
    if config.num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, which only absl programs parse
        batches = batches.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=config.num_workers))
    elif config.prefetch:
        return _ThreadPrefetch(iter(batches), config.prefetch)
    return iter(batches)


def make_eval_batches(
    config: DataConfig,
    num_batches: int,
    *,
    shard: grain.sharding.ShardOptions | None = None,
    split: str = "validation",
) -> Iterable[Batch]:
    """The first batches of a split, the same ones every time.

    One pass over the documents in a fixed shuffled order, so that few batches still see many kinds of text. The last
    batch, and with "streams" a row whose documents are at an end, is filled with weight 0: with enough batches every
    token of the split counts once. Every process goes through all rows and takes its own, so that all have equally many
    batches.

    Args:
      config: what to read; its shuffling, epochs and workers play no part.
      num_batches: at most so many.
      shard: which of several processes this is.
      split: which documents.

    Returns:
      Batches as those of `make_train_iterator`, made anew each time it is iterated over.

    Raises:
      ValueError: as `make_train_iterator`, or fewer than one batch asked for.
    """
    if num_batches < 1:
        raise ValueError(f"num_batches is {num_batches}: at least 1 is needed")
    index, count = _shard(shard)
    share = _share(config.batch_size, count)
    if config.format != "text":
        return evaluate_on_examples(config, prepare_examples(config, split), num_batches, shard=shard)
    tokenizer, source = _open(config, split)
    mine = slice(index * share, (index + 1) * share)
    if config.packing == "streams":
        total = min(config.batch_size, len(source))
        streams = [_token_rows(config, tokenizer, source, _EVAL_SEED, 1, row, total, False) for row in range(total)]
        return _EvalBatches(_EvalStreams(streams, config, num_batches), config, split, mine)
    rows = _token_rows(config, tokenizer, source, _EVAL_SEED, 1, 0, 1, False)
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=config.batch_size)
    batches = grain.experimental.LimitIterDataset(rows.batch(config.batch_size, batch_fn=fill), num_batches)
    return _EvalBatches(batches, config, split, mine)


class _EvalBatches:
    """One process's rows of batches, of which some token must count."""

    def __init__(self, batches: Iterable[Batch], config: DataConfig, split: str, mine: slice):
        self._batches, self._config, self._split, self._mine = batches, config, split, mine

    def __iter__(self) -> Iterator[Batch]:
        counted = False
        for batch in self._batches:
            counted = counted or bool(np.any(batch["weights"]))
            yield {key: value[self._mine] for key, value in batch.items()}
        if not counted:
            raise ValueError(
                f"data source {self._config.source!r}: what is read of the split {self._split!r} becomes no tokens; "
                "there is nothing to evaluate on"
            )


class _EvalStreams:
    """The first batches of streams that end; what has no text, behind an end or for lack of documents, has weight 0."""

    def __init__(self, streams: Sequence[Any], config: DataConfig, num_batches: int):
        self._streams, self._num_batches = streams, num_batches
        self._missing = config.batch_size - len(streams)
        empty = np.zeros(config.seq_len, np.int32)
        self._padding = {"tokens": empty, "targets": empty, "weights": empty.astype(np.float32)}

    def __iter__(self) -> Iterator[Batch]:
        longest = itertools.zip_longest(*self._streams, fillvalue=self._padding)
        for rows in itertools.islice(longest, self._num_batches):
            yield _stack([*rows, *[self._padding] * self._missing])


def _stack(rows: Sequence[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _open(config: DataConfig, split: str) -> tuple[Tokenizer, DocumentSource | RecallRows]:
    tokenizer = load_tokenizer(config.tokenizer)
    recall = open_recall(config.source, split, config.seq_len, tokenizer)
    if recall is not None:
        if config.packing != "concat":
            raise ValueError(f'data source {config.source!r} makes whole rows: set packing to "concat"')
        return tokenizer, recall
    return tokenizer, open_source(config.source, split, text_key=config.text_key, data_dir=config.data_dir)


def _require_documents(
    config: DataConfig, source: DocumentSource | RecallRows, split: str, count: int, what: str
) -> None:
    if len(source) < count:
        raise ValueError(
            f"data source {config.source!r} has {len(source)} documents in {split!r}, for {count} {what}: "
            "split it into more files"
        )


def _token_rows(
    config: DataConfig,
    tokenizer: Tokenizer,
    source: DocumentSource | RecallRows,
    seed: int | None,
    epochs: int | None,
    index: int,
    count: int,
    must_have_tokens: bool = True,
) -> Any:
    """The rows of share `index` of `count` of the documents."""
    if isinstance(source, RecallRows):  # drawn rows: nothing to shuffle, and no end
        return grain.MapDataset.source(source)[index::count].to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
    documents = grain.MapDataset.source(source)
    if seed is not None:
        documents = documents.shuffle(seed)
    if count > 1:
        documents = documents[index::count]
    without = 2 * len(documents) if must_have_tokens else None  # one pass at least, however each is shuffled
    documents = documents.repeat(epochs)
    if config.packing == "pack":
        return pack_rows(documents, tokenizer, config.seq_len, without, config.parse_special)
    bos_each_row = config.bos_each_row and config.packing == "concat"
    return concat_rows(documents, tokenizer, config.seq_len, bos_each_row, without, config.parse_special)


def _shard(shard: grain.sharding.ShardOptions | None) -> tuple[int, int]:
    return (0, 1) if shard is None else (shard.shard_index, shard.shard_count)


def _share(batch_size: int, count: int) -> int:
    if batch_size % count:
        raise ValueError(f"batch_size {batch_size} is not a multiple of the {count} processes")
    return batch_size // count


class _ThreadPrefetch(grain.experimental.ThreadPrefetchDatasetIterator):
    """Grain's, silent where an iterator outlives the modules it would use to close itself, as a script's globals do."""

    def __del__(self) -> None:
        if not sys.is_finalizing():
            super().__del__()
