"""`python -m infer.perplexity`: tables, numbers and pictures that agree."""

import math
import re

import numpy as np
import pytest

import streamjax as sj
from streamjax.commands import comparison, perplexity
from streamjax.data import ByteTokenizer
from streamjax.evaluation import SlotMemory, Trial, run_trial
from tests.commands.command_helpers import read_json

SMALL = "--chunk_size=64"


def test_caches_side_by_side(command, model_folder, text_file, tmp_path):
    outcome = command(
        perplexity, f"--input={text_file}", SMALL, f"--json={tmp_path}/p.json", f"--png={tmp_path}/new/p.png",
        "--dense_capacity=128", "--cache=dense", "--cache=streaming_llm",
    )  # fmt: skip
    assert outcome.status == 0
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")
    found = read_json(tmp_path / "p.json")
    assert [run["name"] for run in found["runs"]] == ["dense", "streaming_llm"]
    assert [run["cache"] for run in found["runs"]] == ["Full(128)", "Sink(4) > Window(28)"]
    assert [run["tokens"] for run in found["runs"]] == [127, 603]
    assert found["runs"][0]["ended"] == "full at 128 tokens"
    cache = sj.kv.preset("streaming_llm", sinks=4, window=28)
    session = sj.Session(sj.load(model_folder), ByteTokenizer(), cache, chunk_size=64)
    trial = run_trial("x", session, list(text_file.read_bytes()))
    assert found["runs"][1]["nats_per_token"] == pytest.approx(float(trial.nats.mean()), rel=1e-5)
    cells = [f"{trial.part(*span).perplexity:,.4g}" for span in ((0, 32), (32, None))]
    row = next(line for line in outcome.out.splitlines() if line.startswith("streaming_llm "))
    assert re.findall(r"[\d.,]+ \(", row) == [f"{cell} (" for cell in cells]


def test_dense_ends_where_its_memory_does(model_folder):
    model = sj.load(model_folder)
    assert comparison.dense_capacity(model, 500, None) == 500
    for tokens in (1, 77):
        state = sj.init_state(model, sj.kv.preset("dense", capacity=tokens))
        memory = SlotMemory.from_state(state).allocated
        assert abs(comparison.dense_capacity(model, 500, memory * 1.02) - tokens) <= 4
    assert comparison.dense_capacity(model, 500, 1e9) == 500


def trial(name: str, *levels: tuple[int, float], slots: int = 512, ended: str = "") -> Trial:
    """A made-up run: so many tokens at such a perplexity."""
    nats = np.concatenate([np.full(count, math.log(level), np.float32) for count, level in levels])
    return Trial(name, nats, SlotMemory((slots,), (1000.0,)), ended, 1.0, 10.0, 1)


def test_the_table_cuts_where_it_is_told():
    trials = [
        trial("dense", (10, 4), (30, 16), slots=40, ended="full at 40 tokens"),
        trial("sinks + window", (10, 4), (30, 2), (60, 8), slots=12),
    ]
    lines = comparison.table(trials, [10, 40], bytes_per_token=2.0).splitlines()
    assert re.split(r"  +", lines[0]) == [
        "cache",
        "first 10",
        "10 to 40",
        "40 to the end",
        "holds",
        "process",
        "tokens/s",
    ]
    assert re.split(r"  +", lines[2]) == [
        "dense",
        "4 (1.00)",
        "16 (2.00)",
        "-",
        "40 kB",
        "1 B",
        "10",
        "full at 40 tokens",
    ]
    assert re.split(r"  +", lines[3]) == ["sinks + window", "4 (1.00)", "2 (0.50)", "8 (1.50)", "12 kB", "1 B", "10"]
