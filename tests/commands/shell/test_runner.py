"""Whatever ends a command is one line on stderr, in words for users, and a status."""

import errno
import os
import random
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from streamjax.commands import chat, demo, find_heads, perplexity, recall, stream, train
from streamjax.commands.shell.progress import progress_bar
from streamjax.commands.shell.runner import keep_compiled, run_command

ROOT = Path(__file__).parents[3]


class PanicException(BaseException):
    """As Rust's panics come: no Exception."""


def run(capsys, body):
    status = run_command("About.", [], body, ["command", "--compilation_cache="])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("window is 0\n  it must be more"), "window is 0 it must be more"),
        (FileNotFoundError(2, "No such file or directory", "book.txt"), "book.txt: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 3 TiB"), "out of memory: Unable to allocate 3 TiB"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 274877906944 bytes."),
            "out of memory (asked for 274877906944 bytes): a smaller cache, chunk or batch takes less, and a mesh "
            "splits the model over devices",
        ),
        (RecursionError("maximum recursion depth exceeded"), "a file or an option is nested too deeply to be read"),
        (OverflowError("int too large"), "a number is too large: int too large"),
        (KeyError("a\x1b[31m"), "internal error, KeyError: 'a\\x1b[31m' (please report it; "),
        (PanicException("index out of bounds"), "internal error, PanicException: index out of bounds (please report"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_goes_wrong_is_one_line(capsys, error, message):
    def body(values):
        raise error

    status, out, err = run(capsys, body)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert err.strip().isprintable()


def test_a_warning_is_one_line_without_a_place_in_the_program(capsys):
    def body(values):
        warnings.warn("config.json has fields\nthat nobody knows", stacklevel=1)

    assert run(capsys, body) == (0, "", "warning: config.json has fields that nobody knows\n")


def test_an_error_begins_on_a_line_of_its_own(capsys):
    def body(values):
        bar = progress_bar(total=3)  # held until the error has been told: a bar that is let go of ends its line
        bar.update(1)
        raise ValueError("the text ends here")

    status, _, err = run(capsys, body)
    assert status == 1
    assert "1/3" in err
    assert err.splitlines()[-1] == "error: the text ends here"


def test_a_long_line_keeps_both_ends(capsys, tmp_path):
    """A path comes before what is wrong with it."""

    def body(values):
        Path(f"{tmp_path}/{'x' * 3000}").read_text()

    status, _, err = run(capsys, body)
    assert status == 1
    assert err.startswith(f"error: {tmp_path}/xxx")
    assert err.endswith(f"xxx: {os.strerror(errno.ENAMETOOLONG)}\n")
    assert len(err) < 600


@pytest.mark.parametrize(
    ("module", "flag"),
    [(chat, "temperature"), (chat, "top_p"), (perplexity, "dense_memory"), (demo, "seconds"), (find_heads, "l1")],
)
def test_numbers_are_numbers(command, module, flag):
    outcome = command(module, f"--{flag}=nan")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: flag --{flag}=nan: it must be a number")


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        *((stream, flag) for flag in ("input", "model", "tokenizer", "load_state", "save_state")),
        (chat, "load_state"),
        (chat, "save_state"),
        (perplexity, "input"),
        (train, "config"),
        (train, "workdir"),
    ],
)
def test_a_path_is_not_empty(command, module, flag):
    """As a variable of the shell that is not set leaves it: what was to be saved would be lost."""
    outcome = command(module, f"--{flag}=", model=None)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: flag --{flag}=: it is empty: name a path, or leave the flag away")


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        *((stream, flag) for flag in ("input", "model", "tokenizer", "load_state", "save_state", "json")),
        (stream, "cache=duo_attention:heads"),
        (perplexity, "png"),
        (find_heads, "output"),
        (demo, "out"),
        (demo, "pretrained"),
        (train, "config"),
        (train, "workdir"),
        (train, "config.data.tokenizer"),
        (train, "config.data.data_dir"),
    ],
)
def test_a_home_that_nobody_has_is_one_line(command, monkeypatch, tmp_path, module, flag):
    monkeypatch.chdir(tmp_path)
    flags = [f"--config={ROOT / 'configs' / 'tiny.py'}", f"--workdir={tmp_path}/run"] if module is train else []
    outcome = command(module, *flags, f"--{flag}=~nobody-of-this-name/x", model=None)
    assert outcome.status in (1, 2)
    assert "~nobody-of-this-name/x: no home folder is known for ~nobody-of-this-name" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "flag"),
    [(stream, "max_tokens"), (stream, "chunk_size"), (perplexity, "dense_capacity"), (chat, "seed"), (recall, "seed")],
)
@pytest.mark.parametrize("value", [2**63, 2**70])
def test_whole_numbers_fit_in_64_bits(command, module, flag, value):
    outcome = command(module, f"--{flag}={value}")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: flag --{flag}={value}: it must fit in 64 bits")
    assert outcome.err.count("\n") == 1


def compile_something(_=None):
    """A program that no cache holds yet, and that is kept however fast it compiles."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    constant = random.SystemRandom().random()
    jax.jit(lambda x: x * constant)(np.ones(3, np.float32))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def test_programs_are_kept_in_a_commands_own_folder_while_it_runs_and_no_longer(tmp_path):
    """JAX writes to the first folder that it was told for ever, which has ended later tests of eight devices."""

    def kept():
        return [len(list((tmp_path / name).glob("*-cache"))) for name in ("first", "second")]

    before = jax.config.jax_compilation_cache_dir
    compile_something()
    for folder, expected in [("first", [1, 0]), ("second", [1, 1])]:
        run_command("About.", [], compile_something, ["command", f"--compilation_cache={tmp_path / folder}"])
        assert kept() == expected
        compile_something()
        assert kept() == expected
        assert jax.config.jax_compilation_cache_dir == before


def test_an_empty_folder_keeps_no_programs_whatever_the_environment_says(tmp_path):
    with keep_compiled(str(tmp_path)):  # as JAX_COMPILATION_CACHE_DIR does
        assert run_command("About.", [], compile_something, ["command", "--compilation_cache="]) == 0
        assert list(tmp_path.iterdir()) == []
        compile_something()
        assert len(list(tmp_path.glob("*-cache"))) == 1
