"""Records become tokens; malformed ones are told by file and line; what is cut is counted."""

import json
import logging

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from streamjax.data import ByteTokenizer, DataConfig, make_eval_batches, make_train_iterator
from streamjax.data.conversations.formats import read_example
from streamjax.data.conversations.prepared import prepare_examples
from streamjax.data.conversations.records import read_lines
from streamjax.data.pipeline import evaluate_on_examples, train_on_examples

BYTES = ByteTokenizer()
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
TALK = {"messages": [USER, ASSISTANT]}


def config(source, kind="conversations", **fields):
    packing = {"conversations": "pack"}.get(kind, "rows")
    truncation = {"prompts": "drop"}.get(kind, "end")
    fields = {"packing": packing, "truncation": truncation, "seq_len": 32, "batch_size": 2} | fields
    return DataConfig(source=source, format=kind, **fields)


def spoken(text):
    """The whole text, and what of it is learnt."""
    ids, learnt = list(map(int, text.ids)), list(text.learnt)
    return BYTES.decode(ids), BYTES.decode([i for i, flag in zip(ids, learnt, strict=True) if flag])


def test_every_form_of_a_record():
    def read(kind, **values):
        return [spoken(text) for text in read_example(values, kind, BYTES)]

    talk = "User: hi\nAssistant: yes\n"
    assert read("conversations", **TALK) == [(talk, " yes\n")]
    assert read("conversations", prompt=[USER], completion=[ASSISTANT]) == [(talk, " yes\n")]
    assert read("conversations", prompt="one ", completion="two") == [("one two", "two")]
    assert read("preferences", prompt="a", chosen="b", rejected="cd") == [("ab", "b"), ("acd", "cd")]
    no = {"role": "assistant", "content": "no"}
    expected = [(talk, " yes\n"), ("User: hi\nAssistant: no\n", " no\n")]
    assert read("preferences", prompt=[USER], chosen=[ASSISTANT], rejected=[no]) == expected
    assert read("preferences", chosen=[USER, ASSISTANT], rejected=[USER, no]) == expected
    assert read("prompts", prompt="ask", reference="x") == [("ask", "")]
    assert read("prompts", prompt=[USER]) == [("User: hi\nAssistant:", "")]
    [text] = read_example({"prompt": "one ", "completion": "two"}, "conversations", BYTES)
    assert (text.ids[0], text.ids[-1], text.learnt[-1]) == (BYTES.bos_id, BYTES.eos_id, True)
    [text] = read_example(TALK, "conversations", BYTES, everything=True)
    assert all(text.learnt)


BAD = {
    "no JSON": (b'{"messages": ', "it is no JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "it is no JSON"),
    "no object": (b"[1]", "it is list in JSON"),
    "no field": ({"text": "x"}, 'it has "text", and a record of conversations has "messages"'),
    "no messages": ({"messages": []}, '"messages" is to be a list of messages'),
    "no role": ({"messages": [{"content": "x"}]}, '"messages", message 0: it has no "role"'),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, '"messages", message 1: it has no "content"'),
    "no text": ({"messages": [USER, {"role": "assistant", "content": 3}]}, '"content" is to be text'),
    "no answer": ({"messages": [USER]}, 'no message there has the role "assistant"'),
    "text and messages": ({"prompt": "x", "completion": [ASSISTANT]}, "are to be both text, or both lists"),
    "no prompt": ({"completion": "x"}, 'it has "completion" and no "prompt"'),
    "tools": ({**TALK, "tools": "{"}, '"tools" is to be a list'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_record_names_its_file_and_line(write_lines, name, caplog):
    record, message = BAD[name]
    file = write_lines("train.jsonl", [TALK, TALK, record, TALK])
    with pytest.raises(ValueError, match=r"set data\.errors to") as error:
        prepare_examples(config(file), "train")
    assert str(error.value).startswith(f"{file}, line 3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.INFO):
        examples = prepare_examples(config(file, errors="skip"), "train")
    assert len(examples) == 3
    assert f"3 conversations of 4 records; 1 skipped as malformed, the first at {file}, line 3: " in caplog.text


@pytest.mark.parametrize(
    ("truncation", "said"),
    [
        (
            "end",
            ["2 conversations", "1 cut to 25 tokens, without their last", "1 left out with nothing to learn"],
        ),
        ("start", ["3 conversations", "2 cut to 25 tokens, without their first"]),
        ("drop", ["1 conversations", "2 left out for having more than 25 tokens"]),
    ],
)
def test_what_is_too_long_is_treated_as_asked_and_counted(write_lines, truncation, said):
    long = {"messages": [USER, {"role": "assistant", "content": "abcdefghijklmnop"}]}
    unheard = {"messages": [{"role": "user", "content": "x" * 99}, {"role": "assistant", "content": "y"}]}
    file = write_lines("train.jsonl", [TALK, long, unheard])
    whole = [read_example(record, "conversations", BYTES)[0].ids for record in (TALK, long, unheard)]
    assert len(whole[0]) == 25
    examples = prepare_examples(config(file, seq_len=24, truncation=truncation), "train")
    kept = {"end": [ids[:25] for ids in whole[:2]], "start": [ids[-25:] for ids in whole], "drop": whole[:1]}
    assert [text.ids.tolist() for [text] in examples.texts] == kept[truncation]
    assert all(line in examples.about for line in said)


def test_files_named_after_splits_and_records_dealt_out_by_their_hash(write_lines, tmp_path):
    for name in (
        "train-1.jsonl",
        "more.jsonl",
        "valid.ndjson",
        "test_a.jsonl",
        ".hidden.jsonl",
    ):
        write_lines(f"data/{name}", [{"name": name}])
    folder = str(tmp_path / "data")
    found = {split: [r.values["name"] for r in read_lines(folder, split)] for split in ("train", "validation", "test")}
    assert found == {
        "train": ["more.jsonl", "train-1.jsonl"],
        "validation": ["valid.ndjson"],
        "test": ["test_a.jsonl"],
    }
    many = write_lines("many.jsonl", [{"n": n} for n in range(300)])
    splits = {split: {r.values["n"] for r in read_lines(many, split)} for split in found}
    assert sorted(n for numbers in splits.values() for n in numbers) == list(range(300))
    assert all(splits.values())
    fewer = write_lines("fewer.jsonl", [{"n": n} for n in range(250)])
    assert {r.values["n"] for r in read_lines(fewer, "validation")} == {n for n in splits["validation"] if n < 250}
    few = write_lines("few.jsonl", [{"n": 0}, {"n": 1}, {"n": 2}])
    assert len(list(read_lines(few, "validation"))) >= 1


def test_sources_that_are_none(write_lines, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for source, message in (
        (str(tmp_path / "nothing.jsonl"), "no JSON lines there"),
        (str(tmp_path / "notes.txt"), "is no file of JSON lines"),
        (str(tmp_path), "no JSON lines there"),
        ("tfds:nothing", "no prepared TFDS dataset 'nothing'"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_examples(config(source, data_dir=str(tmp_path)), "train")
    file = write_lines("train.jsonl", [TALK])
    with pytest.raises(ValueError, match=r"has nothing to learn from: .*0 conversations of 0 records"):
        prepare_examples(config(file), "validation")
    for fields in (
        {"format": "conversations"},
        {"format": "preferences", "packing": "pack"},
        {"format": "prompts", "packing": "rows"},
        {"packing": "rows"},
    ):
        with pytest.raises(ValueError, match="it must be"):
            DataConfig(source=file, **fields)


def test_packed_rows_keep_conversations_apart(write_lines):
    """Segments, positions, targets and weights against the conversations themselves."""
    talks = [{"messages": [USER, {"role": "assistant", "content": "x" * n}]} for n in range(1, 9)]
    file = write_lines("train.jsonl", talks)
    examples = prepare_examples(config(file, seq_len=64), "train")
    expected = sorted(spoken(text) for [text] in examples.texts)
    found = []
    for batch in train_on_examples(config(file, seq_len=64, epochs=1, shuffle_seed=3), examples, 1):
        row = {name: x[0] for name, x in batch.items()}
        assert set(row) == {"tokens", "targets", "weights", "segment_ids", "positions"}
        for segment in range(1, row["segment_ids"].max() + 1):
            place = np.flatnonzero(row["segment_ids"] == segment)
            assert row["positions"][place].tolist() == list(range(len(place)))
            assert (row["targets"][place][:-1] == row["tokens"][place][1:]).all()
            ids = [*row["tokens"][place], row["targets"][place][-1]]
            learnt = row["targets"][place][row["weights"][place] > 0]
            found.append((BYTES.decode(map(int, ids)), BYTES.decode(map(int, learnt))))
        assert not row["weights"][row["segment_ids"] == 0].any()
    assert sorted(found) == expected


@pytest.mark.parametrize("kind", ["conversations", "preferences", "prompts"])
def test_batches_go_on_from_a_saved_place(write_lines, kind):
    records = {
        "conversations": [{"prompt": f"{n}", "completion": f"{n * n}"} for n in range(30)],
        "preferences": [{"prompt": f"{n}", "chosen": f"{n * n}", "rejected": "?" * n} for n in range(1, 30)],
        "prompts": [{"prompt": f"{n}"} for n in range(30)],
    }[kind]
    settings = config(write_lines("train.jsonl", records), kind, batch_size=4)
    batches = make_train_iterator(settings)
    first = [next(batches) for _ in range(5)]
    place = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(9)]
    again = make_train_iterator(settings)
    again.set_state(place)
    for batch in expected:
        found = next(again)
        assert set(found) == set(batch)
        assert all((found[name] == batch[name]).all() for name in batch)
    shapes = {name: x.shape for name, x in first[0].items()}
    if kind == "preferences":
        assert shapes == {"tokens": (4, 32), "targets": (4, 32), "weights": (4, 32), "example": (2,)}
        examples = prepare_examples(settings, "train")
        for batch in first:
            for row, (number, which) in enumerate((n, w) for n in batch["example"] for w in (0, 1)):
                text = examples.texts[number][which]
                assert batch["tokens"][row][: len(text.ids) - 1].tolist() == text.ids[:-1].tolist()
                assert batch["weights"][row].sum() == text.learnt[1:].sum()
    elif kind == "prompts":
        assert shapes == {"example": (4,)}


def test_processes_share_batches_out(write_lines):
    """Each has its own rows of an evaluation's batches, and its own examples of training."""
    records = [{"prompt": f"{n}", "chosen": "b", "rejected": "c"} for n in range(20)]
    settings = config(write_lines("train.jsonl", records), "preferences", batch_size=8, shuffle_seed=None, epochs=1)
    examples = prepare_examples(settings, "train")
    shards = [grain.sharding.ShardOptions(shard_index=i, shard_count=2) for i in range(2)]
    whole = list(evaluate_on_examples(settings, examples, 9))
    parts = zip(*(evaluate_on_examples(settings, examples, 9, shard=shard) for shard in shards), strict=True)
    for batch, mine in zip(whole, parts, strict=True):
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in mine]), value)
    seen = [
        [n for batch in train_on_examples(settings, examples, 8, shard=shard) for n in batch["example"].tolist()]
        for shard in shards
    ]
    assert [len(numbers) for numbers in seen] == [len(examples) // 4 * 2] * 2
    assert len({*seen[0], *seen[1]}) == len(seen[0]) * 2


def test_held_out_rows_are_all_seen_once(write_lines):
    write_lines("d/train.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    write_lines("d/test.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    file = write_lines("d/valid.jsonl", [{"prompt": f"{n}", "chosen": "b", "rejected": "c"} for n in range(5)])
    source = file.rpartition("/")[0]
    batches = list(make_eval_batches(config(source, "preferences", batch_size=4), 9))
    assert [batch["tokens"].shape[0] for batch in batches] == [4, 4, 4]
    assert sum(float(batch["weights"].any(axis=1).sum()) for batch in batches) == 10
    examples = prepare_examples(config(source, "preferences"), "validation")
    assert len(list(evaluate_on_examples(config(source, "preferences", batch_size=4), examples, 2))) == 2


class Talks(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = tfds.features.FeaturesDict({"messages": tfds.features.Sequence(message)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from (("a", TALK), ("b", TALK))


def test_a_dataset_of_tfds(tmp_path):
    Talks(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    settings = config("tfds:talks", data_dir=str(tmp_path))
    examples = prepare_examples(settings, "train")
    assert [spoken(text) for [text] in examples.texts] == [("User: hi\nAssistant: yes\n", " yes\n")] * 2
    with pytest.raises(ValueError, match="no split 'validation'"):
        prepare_examples(settings, "validation")


def test_the_hash_is_of_tokens_and_what_is_learnt(write_lines):
    one = prepare_examples(config(write_lines("train.jsonl", [TALK])), "train")
    same = prepare_examples(config(write_lines("train2.jsonl", [{**TALK, "id": 3}])), "train")
    other = prepare_examples(config(write_lines("train3.jsonl", [TALK]), train_on="all"), "train")
    assert one.sha256() == same.sha256() != other.sha256()
