"""Data that cannot be trained on says so in one line that names it: no tokens, no text, and files that are damaged."""

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from streamjax.data import DataConfig, builtin_corpus, corpus_text, make_eval_batches, make_train_iterator, open_source
from streamjax.data.prepared_corpora import PreparedExamples
from streamjax.data.stdlib_corpus import StdlibCorpus

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer of words, which makes nothing of white space."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def documents(folder, texts):
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index:02}.txt").write_text(text)
    return str(folder)


def refused(make, *words):
    with pytest.raises(ValueError, match=r".") as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("epochs", [None, 1])
@pytest.mark.parametrize("packing", ["concat", "pack", "streams"])
def test_documents_without_tokens_end_in_a_line(tmp_path, words, packing, epochs, prefetch):
    source = documents(tmp_path / "blank", ["\n \n"] * 30)
    config = DataConfig(
        source=source, tokenizer=words, seq_len=4, batch_size=2, bos_each_row=False, packing=packing, epochs=epochs,
        prefetch=prefetch,
    )  # fmt: skip
    if epochs is None:
        refused(lambda: next(make_train_iterator(config)), "no document has a token")
    else:
        with pytest.raises((ValueError, StopIteration)):
            next(make_train_iterator(config))
    refused(lambda: list(make_eval_batches(config, 2)), source, "'validation' becomes no tokens")


@pytest.mark.usual("pack")
@pytest.mark.parametrize("packing", ["concat", "pack"])
def test_documents_without_tokens_are_passed_over(tmp_path, words, packing):
    """One document of thirty has tokens; wherever it falls in an epoch, it is the only one that is read."""
    source = documents(tmp_path / "some", ["\n"] * 15 + ["a b " * 3] + ["\t "] * 14)
    config = DataConfig(
        source=source, tokenizer=words, seq_len=3, batch_size=1, bos_each_row=False, packing=packing, shuffle_tokens=0
    )
    batches = make_train_iterator(config)
    for _ in range(16):
        batch = next(batches)
        assert set(batch["targets"][batch["weights"] > 0].tolist()) <= {1, 2}
        assert batch["weights"].any()
    # The place in the input counts the documents that were passed over, too.
    again = make_train_iterator(config)
    again.set_state(json.loads(json.dumps(batches.get_state())))
    assert (next(again)["targets"] == next(batches)["targets"]).all()


def test_a_stream_of_evaluation_may_be_empty(tmp_path, words):
    """Rows of documents without tokens have weight 0, as rows without documents do."""
    files = documents(tmp_path / "rows", ["a b"] * 40)
    held_out = [Path(piece.file) for piece in open_source(files, "validation")._pieces]
    assert len(held_out) > 1
    held_out[0].write_text("\n \n")
    config = DataConfig(source=files, tokenizer=words, seq_len=2, batch_size=len(held_out), packing="streams")
    (batch, *_) = make_eval_batches(config, 1)
    assert sorted(batch["weights"].any(axis=1).tolist()) == [False] + [True] * (len(held_out) - 1)


NO_TEXT = {
    "talk.jsonl": (b'{"messages": []}\n' * 9, "JSON lines", "set data.format to"),
    "talk.ndjson": (b"{}\n", "JSON lines", '"conversations"'),
    "rows.json": (b"[1, 2]", "records (.json)", "plain text"),
    "rows.csv": (b"a,b\n1,2\n", "records (.csv)", "plain text"),
    "rows.parquet": (b"PAR1", "records (.parquet)", "plain text"),
    "TALK.JSONL": (b"{}\n", "JSON lines", "plain text"),
    "text.txt.gz": (b"\x1f\x8b\x08", "compressed (.gz)", "unpack it"),
    "text.zip": (b"PK", "compressed (.zip)", "unpack it"),
    "model.bin": (b"\0" * 9, "zero bytes", "plain text"),
    "late.txt": (b"text " * 5000 + b"\0", "zero bytes", "plain text"),
}


@pytest.mark.parametrize("name", list(NO_TEXT))
def test_files_that_are_no_text_are_refused(tmp_path, name, caplog):
    content, *said = NO_TEXT[name]
    file = tmp_path / "data" / name
    file.parent.mkdir()
    file.write_bytes(content)
    for spec in (file, f"text:{file}", f"{file.parent}/*", file.parent):
        refused(lambda spec=spec: open_source(str(spec)), str(file), *said)
    # Among others a folder's are passed over, which is logged.
    (file.parent / "a.txt").write_text("text")
    (file.parent / "b.txt").write_text("text")
    assert len(open_source(str(file.parent))) == 1
    assert str(file) in caplog.text
    refused(lambda: open_source(f"{file.parent}/*"), str(file))


def test_files_that_change_while_they_are_read(tmp_path):
    folder = documents(tmp_path / "texts", ["some text"] * 5)
    source = open_source(folder)
    gone, cut = (piece.file for piece in source._pieces[:2])
    gone.unlink()
    os.truncate(cut, 3)
    refused(lambda: source[0], str(gone), "cannot be read any more")
    refused(lambda: source[1], str(cut), "shorter")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of a few documents, prepared as the built-in one is."""
    root = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        few = [(f"doc{index}", f"text {index}\n" * 50) for index in range(60)]
        module = importlib.import_module("streamjax.data.stdlib_corpus")
        patch.setattr(module, "stdlib_documents", lambda *_: iter(few))
        builtin_corpus(root)
    return root


def damage(root, name, how):
    [file] = root.glob(f"*/{StdlibCorpus.name}/stdlib/*/{name}")
    if how == "missing":
        file.unlink()
    elif how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "empty":
        os.truncate(file, 0)
    else:
        file.write_bytes(b"\xff\0[1" * 99)
    return file


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "garbage"])
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "*-validation.array_record-*"])
def test_a_damaged_corpus_names_the_file(tmp_path, corpus, name, how):
    root = tmp_path / "data"
    shutil.copytree(corpus, root)
    assert open_source("builtin", "validation", data_dir=root)[0].startswith("text")
    file = damage(root, name, how)
    folder = next(root.iterdir())
    refused(lambda: open_source("builtin", "validation", data_dir=root), str(file), f"delete {folder}")
    refused(lambda: corpus_text("validation", root), str(file))
    tfds_name = f"tfds:{StdlibCorpus.name}/stdlib"
    message = refused(lambda: open_source(tfds_name, "validation", data_dir=folder))
    assert str(file) in message or (how == "missing" and "no prepared TFDS dataset" in message)


def test_an_example_that_is_damaged_says_which(corpus):
    examples = PreparedExamples(builtin_corpus(corpus), "validation", ("text",), "prepare it again")
    refused(lambda: examples[len(examples)], f"example {len(examples)} of 'validation'", "prepare it again")
    wrong = PreparedExamples(builtin_corpus(corpus), "validation", ("title",), "prepare it again")
    refused(lambda: wrong[0], "example 0 of 'validation': it is not there")
