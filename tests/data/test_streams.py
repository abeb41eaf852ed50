"""packing="streams": each row of a batch is a stream that the same row of the next batch continues."""

import dataclasses
import itertools
import json
from typing import Any

import grain
import numpy as np
import pytest

from streamjax.data import DataConfig, make_eval_batches, make_train_iterator, open_source

pytestmark = pytest.mark.quick

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """3 streams of rows of 20 tokens, from 40 documents of 3 to 52 characters, some of them for validation."""
    root = tmp_path_factory.mktemp("texts")
    for index in range(40):
        (root / f"{index}.txt").write_text(f"<{index}>" * (index % 13 + 1))
    return DataConfig(source=str(root), seq_len=20, batch_size=3, packing="streams")


def _take(config: DataConfig, count: int, **values: Any) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(make_train_iterator(config, **values), count))


def _joined(batches: list[dict[str, np.ndarray]], key: str) -> np.ndarray:
    """[B, batches x T]: what each row reads one batch after another."""
    return np.concatenate([batch[key] for batch in batches], axis=1)


def _documents(tokens: list[int]) -> list[str]:
    """The whole documents of a stream that is BOS text EOS, again and again."""
    assert tokens[0] == BOS
    parts = " ".join(map(str, tokens)).split(f" {EOS}")[:-1]
    assert all(part.split()[0] == str(BOS) for part in parts)
    return [bytes(map(int, part.split()[1:])).decode() for part in parts]


def test_every_row_is_one_stream_of_whole_documents(config: DataConfig) -> None:
    batches = _take(config, 100)
    tokens, targets = _joined(batches, "tokens"), _joined(batches, "targets")
    assert tokens.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(targets[:, :-1], tokens[:, 1:])  # across the borders of batches too
    assert all((batch["weights"] == 1).all() for batch in batches)
    source = open_source(config.source, "train")
    texts = sorted(source[index] for index in range(len(source)))
    streams = [_documents(row.tolist()) for row in tokens]
    shares = [len(texts[row::3]) for row in range(3)]
    for epoch in (0, 1):
        parts = [s[n * epoch : n * (epoch + 1)] for s, n in zip(streams, shares, strict=True)]
        assert sorted(itertools.chain.from_iterable(parts)) == texts
    assert sorted(streams[0][: shares[0]]) != sorted(streams[0][shares[0] : 2 * shares[0]])  # dealt out anew


@pytest.mark.usual("{}", "{'prefetch': 0, 'shuffle_seed': None}")
@pytest.mark.parametrize("values", [{}, {"prefetch": 0, "shuffle_seed": None}, {"num_workers": 1}], ids=str)
def test_resuming_continues_every_stream(config: DataConfig, values: dict[str, Any]) -> None:
    config = dataclasses.replace(config, **values)
    whole = _take(dataclasses.replace(config, num_workers=0), 40)
    state, found = None, []
    for cut in (7, 29, 40):
        iterator = make_train_iterator(config)  # as a new process would
        if state is not None:
            iterator.set_state(json.loads(json.dumps(state)))
        found += list(itertools.islice(iterator, cut - len(found)))
        state = iterator.get_state()
    for key in ("tokens", "targets"):
        np.testing.assert_array_equal(_joined(found, key), _joined(whole, key))


def test_processes_share_the_streams(config: DataConfig) -> None:
    whole = _take(config, 10)
    shards = [grain.sharding.ShardOptions(shard_index=index, shard_count=3) for index in range(3)]
    parts = [_joined(_take(config, 10, shard=shard), "tokens") for shard in shards]
    np.testing.assert_array_equal(np.concatenate(parts), _joined(whole, "tokens"))


def test_with_an_end_training_stops_at_the_shortest_stream(config: DataConfig) -> None:
    batches = _take(dataclasses.replace(config, epochs=1), 1000)
    endless = _take(config, len(batches))
    assert 0 < len(batches) < 100
    np.testing.assert_array_equal(_joined(batches[:-1], "tokens"), _joined(endless[:-1], "tokens"))


@pytest.mark.parametrize("spare", [0, 2])
def test_evaluation_reads_every_token_once(config: DataConfig, spare: int) -> None:
    """Here each document is a stream; spare streams have nothing to read."""
    source = open_source(config.source, "validation")
    batch_size = len(source) + spare
    assert batch_size >= 2
    batches = list(make_eval_batches(dataclasses.replace(config, batch_size=batch_size), 1000))
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, 20)}
    tokens, targets, weights = (_joined(batches, key) for key in ("tokens", "targets", "weights"))
    streams = [row[kept > 0].tolist() for row, kept in zip(tokens, weights, strict=True)]
    expected = [[BOS, *source[index].encode(), EOS] for index in range(len(source))]
    assert sorted(streams) == sorted([*expected, *[[]] * spare])
    for row, following, kept in zip(tokens, targets, weights, strict=True):
        count = int(kept.sum())
        assert not kept[count:].any()
        assert following[:count].tolist() == [*row[1:count], BOS][:count]
    first = list(make_eval_batches(dataclasses.replace(config, batch_size=batch_size), 1))
    np.testing.assert_array_equal(first[0]["tokens"], batches[0]["tokens"])
    assert len(first) == 1


def test_what_cannot_be_dealt_out_is_said(config: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"documents in 'train', for 99 streams: split it into more files"):
        make_train_iterator(dataclasses.replace(config, batch_size=99))
    with pytest.raises(ValueError, match=r'^DataConfig.num_workers is 2: packing "streams" takes 0 or 1$'):
        dataclasses.replace(config, num_workers=2)
