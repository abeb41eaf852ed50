"""`python -m infer.leaderboard`: rows of equal bytes, taken up after an interrupt, beside rows of others."""

import json
import os
import signal

import jax
import pytest

import streamjax as sj
from streamjax.commands import leaderboard
from tests.commands.command_helpers import read_json
from tests.covering import rest_slow

RUN = ("--tasks=passkey,scbench_kv,niah_single_1", "--length=1100", "--samples=2", "--batch_size=2", "--chunk_size=256",
       "--cache=streaming_llm", "--budget=0.25", "--answer_tokens=6")  # fmt: skip


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "long.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 60)
    return path


def without_times(board):
    return [{key: value for key, value in row.items() if key != "timing"} for row in board["rows"]]


@pytest.mark.parametrize("spec", rest_slow(["snapkv", "finch", "ada_kv", "chunkkv"], "snapkv", "ada_kv"))
def test_room_for_answers_is_no_budget_for_contexts(model_folder, spec):
    """In fewer bits the room takes less, and nothing more is kept of the context for that."""
    model, length, room = sj.load(model_folder), 1100, 300
    specs = (spec, f"{spec}:codec=int4")
    (_, *found), refused = leaderboard.make_caches(model, specs, [], [0.25], length, room, "prompt")
    assert not refused
    kept = []
    for *_, cache in found:
        tier = cache.tiers[-1]
        kept.append(cache.slots - tier.every)
        assert tier.every >= room
    assert 0.8 * 0.25 * length < kept[0] <= 0.25 * length
    assert kept[0] < kept[1] <= 8 * kept[0]  # 4 bits for 32, and scales


@pytest.mark.parametrize(
    ("arguments", "specs"),
    [
        (["--fixed=window:window=64"], []),
        (["--fixed=window:window=64", "--cache=h2o"], ["h2o"]),
        ([], leaderboard._CACHES),
    ],
)
def test_caches_as_they_are_come_alone(command, model_folder, tmp_path, monkeypatch, arguments, specs):
    def make_caches(model, given, fixed, *rest):
        raise ValueError(f"{list(given)} and {list(fixed)}")

    monkeypatch.setattr(leaderboard, "make_caches", make_caches)
    rest = ("--tasks=passkey", "--length=1100", "--samples=1", "--text=", "--png=", f"--json={tmp_path}/new.json")
    done = command(leaderboard, f"--model={model_folder}", *rest, *arguments)
    assert f"{specs} and {['window:window=64'] if arguments else []}" in done.err


@pytest.mark.slow
def test_an_interrupted_run_ends_as_one_that_was_not(command, model_folder, long_text, tmp_path, monkeypatch):
    whole = command(leaderboard, *RUN, f"--text={long_text}", f"--json={tmp_path}/a.json", f"--png={tmp_path}/a.png")
    assert whole.status == 0, whole.err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    board = read_json(tmp_path / "a.json")
    assert [row["label"] for row in board["rows"]] == ["dense", "streaming_llm 0.25"]
    assert list(board["left_out"]) == ["scbench_kv"]  # five pairs of UUIDs are more than 1,100 bytes
    model = sj.load(model_folder)
    dense = sj.kv.describe(sj.kv.preset("dense", capacity=1100), model).total
    for row in board["rows"]:
        assert list(row["tasks"]) == ["passkey", "niah_single_1"]
        assert all(len(task["scores"]) == 2 for task in row["tasks"].values())
        assert row["mean"] == 0  # random weights
        assert row["perplexity"] > 100
        if row["method"] != "dense":
            assert 0.96 * row["budget"] * dense < row["state_bytes"] <= row["budget"] * dense
            assert row["bytes_per_token"] == row["state_bytes"] / 1100
    lines = whole.out.splitlines()
    assert lines[1].split()[:4] == ["cache", "bytes", "passkey", "niah_single_1"]
    assert lines[3].split()[:5] == ["dense", "1", "0±0", "0±0", "0±0"]
    assert "left out: scbench_kv: task 'scbench_kv' needs" in whole.out

    answer, calls = leaderboard.answer, []
    client = jax.devices()[0].client

    def interrupted(*args, **options):
        calls.append(len(client.live_executables()))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return answer(*args, **options)

    monkeypatch.setattr(leaderboard, "answer", interrupted)
    parts = (*RUN, f"--text={long_text}", f"--json={tmp_path}/b.json", "--png=")
    first = command(leaderboard, *parts)
    assert first.status == 128 + signal.SIGINT
    done = without_times(read_json(tmp_path / "b.json"))
    assert sum(len(row["tasks"]) for row in done) == 3
    assert done == [
        {**row, "tasks": {task: row["tasks"][task] for task in list(row["tasks"])[: len(part["tasks"])]}}
        for row, part in zip(without_times(board), done, strict=False)
    ]
    second = command(leaderboard, *parts)
    assert second.status == 0
    assert len(calls) == 4
    assert calls[2] < calls[1]  # the programs of the cache before are gone
    assert without_times(read_json(tmp_path / "b.json")) == without_times(board)

    # Rows of another program stand beside them, and the run is not done again.
    other = {"rows": [{"method": "SnapKV", "budget": 0.25, "source": "kvpress 0.5.5", "state_bytes": 9000,
                       "tasks": {"passkey": {"mean": 0.5, "standard_error": 0.25}}}]}  # fmt: skip
    (tmp_path / "other.json").write_text(json.dumps(other))
    third = command(leaderboard, *parts, f"--beside={tmp_path}/other.json")
    assert len(calls) == 4
    row = next(line for line in third.out.splitlines() if line.startswith("SnapKV (kvpress 0.5.5)")).split()
    assert row[3:7] == ["0.25", "50±25", "-", "50"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget=0.5,2"], "--budget: '2' is no share of a dense cache"),
        (
            ["--budget=0.25,0.00001", "--cache=streaming_llm", "--tasks=passkey", "--samples=1"],
            "--budget=1e-05 is below every cache: the smallest is streaming_llm, from 0.0",
        ),
        (["--budget=half"], "--budget: 'half' is no share of a dense cache"),
        (["--tasks=rulers"], "unknown task 'rulers'; use one of ruler"),
        (["--cache=snapky"], "unknown cache 'snapky'; did you mean 'snapkv'"),
        (["--tasks=cwe", "--length=600"], "--tasks=cwe: nothing is left; task 'cwe' needs"),
        (["--tasks=qa_1", "--documents={folder}"], "no squad.json or dev-v2.0.json, which task 'qa_1' asks about"),
        (["--beside={folder}/other.json"], "other.json: no file of results; it has to look like"),
        (["--json={folder}/other.json"], "other.json is there, and holds no leaderboard: name another file"),
        (["--json={folder}/run.json"], "run.json holds a run with model=None, and this one has model="),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, arguments, message):
    (tmp_path / "other.json").write_text('{"rows": 3}')
    (tmp_path / "run.json").write_text('{"rows": []}')
    given = [argument.format(folder=tmp_path) for argument in arguments]
    rest = [f"--json={tmp_path}/new.json"] if not any("--json" in argument for argument in given) else []
    rest += ["--length=1000"] if not any("--length" in argument for argument in given) else []
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = command(leaderboard, "--png=", "--text=", *rest, *given)
    assert done.status == 1
    assert message in done.err
    assert done.err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
