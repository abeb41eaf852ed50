"""Command lines with drawn values: they do what they are told, or end with one line of error and its exit status."""

import random
from pathlib import Path

import pytest

import streamjax as sj
from streamjax.commands import chat, perplexity, recall, stream, train
from streamjax.training.run.overrides import field_names
from tests.commands.conftest import command, ctrl_c, model_folder  # noqa: F401  (fixtures)
from tests.fuzz.mutations import draws, read_or_refused

TEXT = "It was the best of times.\n"
ODD = ["", " ", "x", "nan", "inf", "-inf", "-1", "0", "1e999", "-0.0", "٣", "naïve", "\U0001f600", "a\nb", "\0", "%s",
       "--x", "true", "None", "[]", "{}", "1,2", "=", ":", "\\", "'", "\x1b[31m", "x" * 3000, "\udcff"]  # fmt: skip
LARGE = [str(2**31), str(2**62), str(2**63), str(-(2**70)), "9" * 5000]  # where no run gets longer or larger by them
# Flags by what they hold. "few" is of what a run has many of: it takes no large number, which it would obey.
SHARED = {"dtype": "word", "mesh": "mesh", "tokenizer": "path", "cache": "cache", "chunk_size": "number"}
SAMPLING = {"temperature": "number", "top_k": "number", "top_p": "number", "min_p": "number", "stop": "word",
            "repetition_penalty": "number", "seed": "number", "max_new_tokens": "few"}  # fmt: skip
FLAGS = {
    stream: SHARED | {"input": "path", "max_tokens": "number", "errors": "word", "json": "output",
                      "load_state": "path", "save_state": "output", "parse_special": "word"},
    perplexity: SHARED | {"input": "path", "max_tokens": "number", "dense_capacity": "number", "dense_memory": "few",
                          "json": "output", "png": "output"},
    chat: SHARED | SAMPLING | {"system": "word", "template_kwargs": "word", "load_state": "path",
                               "save_state": "output"},
    recall: SHARED | {"task": "word", "lengths": "few", "depths": "few", "samples": "few", "needles": "few",
                      "phrasing": "word", "haystack": "word", "batch_size": "few", "seed": "number",
                      "json": "output", "png": "output"},
}  # fmt: skip
SMALL = {
    stream: [],
    perplexity: ["--input={}/text.txt", "--json=", "--png=", "--cache=window:window=8"],
    chat: ["--max_new_tokens=2"],
    recall: ["--json=", "--png=", "--lengths=200", "--depths=1", "--samples=1", "--cache=window:window=8"],
}


def draw_value(kind, folder, rng):
    """A value for a flag; most of them make no sense."""
    match kind:
        case "number":
            return rng.choice(ODD + LARGE)
        case "path":
            return rng.choice([*ODD, "/", "/dev/null/x", f"{folder}", f"{folder}/nothing", f"{folder}/text.txt"])
        case "output":
            return rng.choice([*ODD, "/", "/dev/full", "/proc/x", f"{folder}", f"{folder}/text.txt/x"])
        case "mesh":
            axis = rng.choice(["data", "fsdp", "context", "tensor", "tensr", ""])
            return rng.choice([f"{axis}={rng.choice(ODD + LARGE)}", f"{axis}=9", f"{axis}=1,{axis}=1", axis])
        case "cache":
            return draw_cache(rng)
    return rng.choice(ODD)


def draw_cache(rng):
    """The name of a cache, or nearly so, and options, some of which are its own."""
    presets = sj.kv.presets()
    name = rng.choice([*presets, *ODD])
    known = list(presets[name].options) if name in presets else []
    options = [f"{rng.choice([*known, *ODD])}={rng.choice([*ODD, *LARGE])}" for _ in range(rng.randrange(3))]
    return f"{name}{rng.choice([':', ':', ',', ''])}{rng.choice([',', ',', ' ', ':']).join(options)}"


def run(command, module, arguments, **options):  # noqa: F811
    """The outcome of a command line that has ended as it should, whatever it was."""

    def main():
        outcome = command(module, *arguments, **options)
        lines = outcome.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert outcome.status in (0, 1, 2), outcome
        assert len(errors) == (outcome.status != 0), outcome
        assert not any("Traceback" in line or "internal error" in line for line in lines), outcome
        assert not errors or lines[-1] == errors[0], outcome
        return outcome

    outcome, message = read_or_refused(main, (module.__name__, arguments))
    assert outcome is not None, (message, arguments)
    return outcome


@draws(8)
@pytest.mark.parametrize("module", FLAGS)
def test_drawn_flags_end_in_one_line(command, module, tmp_path, monkeypatch, draws):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    rng = random.Random(module.__name__)
    small = ["--chunk_size=8", *(argument.format(tmp_path) for argument in SMALL[module])]
    failed = 0
    for _ in range(draws):
        flags = rng.sample(list(FLAGS[module]), rng.randint(1, 2))
        drawn = [f"--{flag}={draw_value(FLAGS[module][flag], tmp_path, rng)}" for flag in flags]
        failed += run(command, module, [*small, *drawn], stdin=TEXT).status != 0
    assert failed > draws / 4


@draws(8)
@pytest.mark.parametrize("module", FLAGS)
def test_drawn_words_end_in_one_line(command, module, tmp_path, monkeypatch, draws):  # noqa: F811
    """No flags at all, flags of no command, models that are none, and files of flags."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    rng = random.Random(module.__name__)
    for _ in range(draws):
        value = draw_value("path", tmp_path, rng)
        word = rng.choice([f"--{value}", f"-{value}", f"--no{value}", f"--flagfile={value}", f"--model={value}", value])
        outcome = run(command, module, ["--chunk_size=8", f"--tokenizer={tmp_path}/nothing", word], stdin=TEXT)
        assert outcome.status or word in ("--help", "-h")


@draws(30)
def test_drawn_configurations_of_training_end_in_one_line(command, tmp_path, monkeypatch, draws):  # noqa: F811
    """There is no text to train on, so that what is accepted ends there."""
    config = Path(__file__).parents[2] / "configs" / "tiny.py"
    names = field_names(train.read_config(str(config), []))
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for _ in range(draws):
        drawn = [f"--config.{rng.choice([*names, *ODD])}={rng.choice(ODD + LARGE)}" for _ in range(rng.randint(1, 2))]
        others = [f"--{rng.choice(['workdir', 'config', 'resume_from'])}={draw_value('path', tmp_path, rng)}"]
        arguments = [f"--workdir={tmp_path}/run", f"--config={config}", *drawn, *others[: rng.randrange(2)]]
        outcome = run(command, train, [*arguments, "--config.data.source=nothing/*.txt"], model=None)
        assert outcome.status
