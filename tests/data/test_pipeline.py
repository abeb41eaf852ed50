"""Batches: shuffled anew each epoch, whole, shared out between processes, and resumed exactly."""

import collections
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.data import DataConfig, make_eval_batches, make_train_iterator, open_source
from tests.covering import rest_slow

pytestmark = pytest.mark.quick

BOS, EOS = 256, 257
Batches = list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 documents of 3 to 52 characters, 2 of them for validation: some 5 batches."""
    root = tmp_path_factory.mktemp("texts")
    for index in range(25):
        (root / f"{index}.txt").write_text(f"<{index}>" * (index % 13 + 1))
    return root


def _config(folder: Path, **values: Any) -> DataConfig:
    return DataConfig(**{"source": str(folder), "seq_len": 32, "batch_size": 4, "shuffle_tokens": 0, **values})


def _take(iterator: Any, count: int) -> Batches:
    return [next(iterator) for _ in range(count)]


def _equal(first: Batches, second: Batches) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def _documents(targets: np.ndarray) -> list[str]:
    """The whole documents in a stream of targets."""
    parts = " ".join(map(str, targets.tolist())).split(str(EOS))[:-1]
    return [bytes(map(int, part.split())).decode() for part in parts]


def _sources(config: DataConfig, split: str = "train") -> list[str]:
    source = open_source(config.source, split)
    return [source[index] for index in range(len(source))]


def test_every_epoch_holds_every_document_in_a_new_order(folder: Path) -> None:
    config = _config(folder, epochs=3, batch_size=1)
    documents = _documents(np.concatenate([b["targets"][b["weights"] > 0] for b in make_train_iterator(config)]))
    texts = _sources(config)
    epochs = [documents[start : start + len(texts)] for start in range(0, 3 * len(texts), len(texts))]
    for epoch in epochs:
        assert sorted(epoch) == sorted(texts)
        assert epoch != texts
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = _take(make_train_iterator(_config(folder, shuffle_seed=1)), 3)
    same = _take(make_train_iterator(_config(folder, shuffle_seed=0)), 3)
    _equal(_take(make_train_iterator(_config(folder)), 3), same)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(same, other, strict=True))


def test_without_a_seed_the_source_keeps_its_order(folder: Path) -> None:
    config = _config(folder, shuffle_seed=None, shuffle_tokens=1 << 20, epochs=1, batch_size=1)
    documents = _documents(np.concatenate([b["targets"][b["weights"] > 0] for b in make_train_iterator(config)]))
    assert documents == _sources(config)


def test_rows_are_shuffled_within_the_buffer(folder: Path) -> None:
    def rows(shuffle_tokens: int) -> list[bytes]:
        batches = make_train_iterator(_config(folder, epochs=1, batch_size=1, shuffle_tokens=shuffle_tokens))
        return [batch["targets"].tobytes() for batch in batches]

    plain, shuffled = rows(0), rows(32 * 10)
    assert collections.Counter(plain) == collections.Counter(shuffled)
    assert plain != shuffled
    for start in range(0, len(plain), 10):
        assert collections.Counter(plain[start : start + 10]) == collections.Counter(shuffled[start : start + 10])


RESUMED: list[dict[str, Any]] = [
    {"packing": "concat", "epochs": 3, "batch_size": 7, "shuffle_tokens": 32 * 20},
    {"packing": "concat", "bos_each_row": False, "shuffle_tokens": 32 * 30},
    {"packing": "pack", "shuffle_tokens": 32 * 30, "batch_size": 3, "prefetch": 0},
    {"packing": "pack", "epochs": 3, "prefetch": 0, "shuffle_seed": None},
]
TOTAL = 20  # batches of the endless ones: several epochs


@pytest.mark.parametrize("values", rest_slow(RESUMED, RESUMED[0], RESUMED[3]), ids=str)
def test_resuming_gives_the_batches_of_an_uninterrupted_run(values: dict[str, Any], folder: Path) -> None:
    config = _config(folder, **values)
    whole = list(itertools.islice(make_train_iterator(config), None if config.epochs else TOTAL))
    assert len(whole) > 5

    @settings(max_examples=4)
    @given(st.lists(st.integers(0, len(whole)), min_size=1, max_size=3))
    def resume(cuts: list[int]) -> None:
        state, batches = None, []
        for cut in [*sorted(cuts), len(whole)]:
            iterator = make_train_iterator(config)  # as a new process would
            if state is not None:
                iterator.set_state(json.loads(json.dumps(state)))
            batches += _take(iterator, cut - len(batches))
            state = iterator.get_state()
        _equal(batches, whole)
        if config.epochs:
            assert next(iterator, None) is None

    resume()


def test_an_iterator_can_go_back(folder: Path) -> None:
    iterator = make_train_iterator(_config(folder, shuffle_tokens=32 * 7))
    _take(iterator, 5)
    state = iterator.get_state()
    first = _take(iterator, 12)
    iterator.set_state(state)
    _equal(_take(iterator, 12), first)


def test_orbax_saves_the_place(folder: Path, tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    config = _config(folder)
    iterator = make_train_iterator(config)
    _take(iterator, 21)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(21, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        fresh = make_train_iterator(config)
        manager.restore(21, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    _equal(_take(fresh, 20), _take(iterator, 20))


def test_processes_share_the_documents(folder: Path) -> None:
    config = _config(folder, epochs=2, batch_size=3)
    texts, shares = _sources(config), []
    for index in range(3):
        shard = grain.sharding.ShardOptions(shard_index=index, shard_count=3)
        batches = list(make_train_iterator(config, shard=shard))
        assert {batch["tokens"].shape for batch in batches} == {(1, 32)}
        shares.append(_documents(np.concatenate([b["targets"][b["weights"] > 0] for b in batches])))
    for epoch in (0, 1):
        parts = [share[len(share) // 2 * epoch :][: len(share) // 2] for share in shares]
        assert sorted(itertools.chain.from_iterable(parts)) == sorted(texts)
    with pytest.raises(ValueError, match="batch_size 4 is not a multiple of the 3 processes"):
        make_train_iterator(_config(folder), shard=grain.sharding.ShardOptions(shard_index=0, shard_count=3))
    many = grain.sharding.ShardOptions(shard_index=0, shard_count=64)
    with pytest.raises(ValueError, match="for 64 processes: split it into more files"):
        make_train_iterator(_config(folder, batch_size=64), shard=many)


@pytest.mark.parametrize("packing", ["concat", "pack"])
def test_eval_batches_hold_every_token_once(packing: str, folder: Path) -> None:
    config = _config(folder, packing=packing, batch_size=3, epochs=2, shuffle_seed=9)
    batches = make_eval_batches(config, 10_000, split="train")
    first = list(batches)
    _equal(list(batches), first)
    _equal(list(make_eval_batches(_config(folder, packing=packing, batch_size=3), 10_000, split="train")), first)
    _equal(list(make_eval_batches(config, 2, split="train")), first[:2])
    assert {batch["tokens"].shape for batch in first} == {(3, 32)}
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in first]).tolist()
    texts = _sources(config)
    assert sorted(targets) == sorted(token for text in texts for token in [*text.encode(), EOS])
    assert {float(w) for b in first for w in b["weights"].ravel()} <= {0.0, 1.0}


def test_eval_is_shared_by_rows_and_uses_the_validation_split(folder: Path) -> None:
    config = _config(folder)
    whole = list(make_eval_batches(config, 5))
    shards = [grain.sharding.ShardOptions(shard_index=index, shard_count=2) for index in (0, 1)]
    parts = [list(make_eval_batches(config, 5, shard=shard)) for shard in shards]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)]
    _equal(joined, whole)
    texts = _sources(config, "validation")
    assert sum(batch["weights"].sum() for batch in whole) == sum(len(text) + 1 for text in texts)
    with pytest.raises(ValueError, match="num_batches is 0"):
        make_eval_batches(config, 0)


def test_one_document_is_enough(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("0123456789\n" * 50)
    [batch] = _take(make_train_iterator(DataConfig(source=str(tmp_path / "book.txt"), seq_len=16, batch_size=2)), 1)
    assert batch["tokens"].shape == (2, 16)
    assert (batch["tokens"][:, 0] == BOS).all()


@pytest.mark.slow
def test_a_worker_process_gives_the_same_batches(folder: Path) -> None:
    config = _config(folder, shuffle_tokens=32 * 7)
    iterator = make_train_iterator(dataclasses.replace(config, num_workers=1))
    expected = _take(make_train_iterator(config), 12)
    _equal(_take(iterator, 6), expected[:6])
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    resumed = make_train_iterator(dataclasses.replace(config, num_workers=1))
    resumed.set_state(state)
    _equal(_take(resumed, 6), expected[6:])
    resumed.close()
