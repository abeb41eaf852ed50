"""Files that a command is to write are looked at before the work, and what was found is not lost when it is stopped."""

import signal

import pytest

import streamjax as sj
from streamjax.commands import chat, comparison, demo, find_heads, measure_budget, perplexity, recall, stream
from tests.commands.command_helpers import read_json

NUMBERS, STREAM, FOLDER = "file of numbers", "saved stream", "folder"
OUTPUTS = [
    (stream, "json", NUMBERS),
    (stream, "save_state", STREAM),
    (chat, "save_state", STREAM),
    (perplexity, "json", NUMBERS),
    (perplexity, "png", NUMBERS),
    (recall, "json", NUMBERS),
    (recall, "png", NUMBERS),
    (find_heads, "output", NUMBERS),
    (measure_budget, "output", NUMBERS),
    (demo, "out", FOLDER),
]
PLACES = ("below a file", "in a device", "a folder", "something else", "a loop", "where nothing is made")
FITS = {NUMBERS: "something else", FOLDER: "a folder"}  # a file is replaced, a folder written into
UNFIT = [(module, flag, where) for module, flag, kind in OUTPUTS for where in PLACES if where != FITS.get(kind)]


@pytest.fixture
def unloaded(monkeypatch):
    """Commands that fail when they come to their model."""

    def load(*_, **__):
        raise AssertionError("the model is loaded")

    for module in {module for module, _, _ in OUTPUTS}:
        monkeypatch.setattr(module, "load_model" if hasattr(module, "load_model") else "sj", load)


@pytest.mark.parametrize(("module", "flag", "where"), UNFIT)
def test_a_path_that_cannot_be_written_is_told_before_the_work(command, unloaded, tmp_path, module, flag, where):
    (tmp_path / "file").write_text("words")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("words")
    (tmp_path / "loop").symlink_to("loop")
    kind = next(kind for *names, kind in OUTPUTS if names == [module, flag])
    path = {
        "below a file": tmp_path / "file" / "new" / "x",
        "in a device": "/dev/null/x",
        "a folder": tmp_path / "mine",
        "something else": tmp_path / "file",
        "a loop": tmp_path / "loop",
        "where nothing is made": {NUMBERS: "/proc/self/comm", STREAM: "/proc/self/new", FOLDER: "/proc/self"}[kind],
    }[where]
    before = sorted(tmp_path.rglob("*"))
    outcome = command(module, f"--{flag}={path}", stdin="hello\n")
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: --{flag}")
    assert str(path) in outcome.err
    assert outcome.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("module", "flags", "taken"),
    [
        (stream, ["--input={}/text.txt", "--json={}/text.txt"], "input"),
        (stream, ["--input={}/link", "--json={}/text.txt"], "input"),
        (stream, ["--input={}/text.txt", "--save_state={}/new", "--json={}/new"], "json"),
        (perplexity, ["--input={}/text.txt", "--json=", "--png={}/text"], "input"),
        (perplexity, ["--input=builtin", "--json={}/mine/../p", "--png={}/p"], "json"),
        (recall, ["--json={}/p", "--png={}/p"], "json"),
    ],
)
def test_no_output_takes_the_place_of_another_file_of_the_command(command, unloaded, tmp_path, module, flags, taken):
    (tmp_path / "mine").mkdir()
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "link").symlink_to("text.txt")
    (tmp_path / "text").symlink_to("text.txt")
    outcome = command(module, *(flag.format(tmp_path) for flag in flags))
    assert outcome.status == 1
    assert f"would replace what --{taken} names: give it another name" in outcome.err
    assert outcome.err.count("\n") == 1
    assert (tmp_path / "text.txt").read_text() == "words"


@pytest.mark.parametrize("module", [perplexity, recall])
def test_a_picture_of_no_format_is_told_before_the_work(command, unloaded, tmp_path, module):
    outcome = command(module, "--json=", f"--png={tmp_path}/p.txt")
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: --png={tmp_path}/p.txt: no format of pictures is called 'txt'; end the name")


def test_looking_at_a_path_leaves_nothing_behind(command, unloaded, tmp_path):
    outcome = command(stream, f"--json={tmp_path}/new/r.json", f"--save_state={tmp_path}/other/s")
    assert "the model is loaded" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_comparison_that_is_stopped_keeps_what_it_has(command, monkeypatch, text_file, tmp_path, number):
    real = comparison.run_trial

    def run_trial(*arguments, **options):
        signal.raise_signal(number)
        return real(*arguments, **options)

    monkeypatch.setattr(comparison, "run_trial", run_trial)
    files = [f"--json={tmp_path}/p.json", f"--png={tmp_path}/p.png"]
    outcome = command(perplexity, f"--input={text_file}", "--chunk_size=64", *files)
    assert outcome.status == 128 + number
    assert outcome.err.splitlines()[-1] == "error: interrupted; what was measured until then is kept"
    runs = read_json(tmp_path / "p.json")["runs"]
    assert [run["name"] for run in runs] == ["dense"]
    assert 0 < runs[0]["tokens"] < 603
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_questions_that_were_asked_are_kept(command, monkeypatch, tmp_path, number):
    real, calls = recall.run_recall, []

    def run_recall(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(number)
        return real(*arguments, **options)

    monkeypatch.setattr(recall, "run_recall", run_recall)
    flags = ["--lengths=200,300", "--depths=1", "--samples=1", "--cache=window:window=16"]
    outcome = command(recall, *flags, f"--json={tmp_path}/r.json", f"--png={tmp_path}/r.png")
    assert outcome.status == 128 + number
    assert len(read_json(tmp_path / "r.json")["runs"]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_conversation_that_is_ended_is_saved(command, model_folder, monkeypatch, tmp_path, number):
    real, pieces = chat._say, []

    def say(text):
        pieces.append(text)
        if len(pieces) == 3:
            signal.raise_signal(number)
        real(text)

    monkeypatch.setattr(chat, "_say", say)
    outcome = command(chat, "--max_new_tokens=12", f"--save_state={tmp_path}/c", stdin="hello\nand then?\n")
    assert outcome.status == 128 + number
    assert outcome.err.splitlines()[-1] == f"error: {number.name}"
    session = sj.Session(sj.load(model_folder), sj.load_tokenizer(), sj.kv.preset("streaming_llm", sinks=4, window=28))
    session.load(tmp_path / "c")
    assert session.tokens_seen > 20
