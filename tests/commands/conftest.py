"""A tiny model on disk, and a way to run a command line here, as if from a shell."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import streamjax as sj
from tests.training.conftest import run_config, text_folder  # noqa: F401  fixtures of test_train.py

TRAINED = 32


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level model with random weights, "trained" at 32 tokens, as a Hugging Face folder."""
    config = sj.UniformConfig(
        vocab_size=259,
        d_model=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=16,
        tie_embeddings=True,
        max_position=TRAINED,
        bos_token_id=256,
        eos_token_ids=(257,),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sj.save_hf(sj.Decoder(config, jax.random.key(1)), folder)
    return folder


@pytest.fixture(autouse=True)
def ctrl_c():
    """Signals do what they do in a terminal, also where the suite runs in the background, or under nohup."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a module's `main` with --model and the given arguments; `stdin` is text or bytes, read from a pipe."""

    def run(module, *arguments: str, stdin: str | bytes = "", model: Path | None = model_folder) -> Outcome:
        argv = [module.__name__, "--compilation_cache=", *arguments]
        if model is not None:
            argv.append(f"--model={model}")
        data = stdin.encode() if isinstance(stdin, str) else stdin
        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
            status = module.main(argv)
        return Outcome(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of 600 bytes."""
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was\nthe worst of times - naïve café\n" * 9, encoding="utf-8")
    assert os.path.getsize(path) == 603
    return path
