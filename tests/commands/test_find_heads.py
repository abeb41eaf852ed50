"""`python -m train.find_heads`: files that the caches read, Ctrl-C that keeps what there is, errors of one line."""

import json
import signal

import numpy as np
import pytest

import streamjax as sj
from streamjax.commands import find_heads, perplexity
from streamjax.data.recall.training_rows import RecallRows
from streamjax.training.heads.scores import HeadScores, protected_heads
from tests.streaming.tiny_models import build

CONFIG = sj.UniformConfig(
    vocab_size=259, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16, tie_embeddings=True,
    max_position=224, bos_token_id=256, eos_token_ids=(257,),
)  # fmt: skip
SMALL = ("--steps=3", "--sinks=4", "--recent=16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of tiny models: a plain one, one with a layer more, one with a head more, one with windows only."""
    root = tmp_path_factory.mktemp("models")
    configs = {
        "plain": CONFIG,
        "deeper": CONFIG.replace(num_layers=3),
        "wider": CONFIG.replace(num_kv_heads=4),
        "windows": CONFIG.replace(windows=(8, 8), family="mistral"),
    }
    for name, config in configs.items():
        sj.save_hf(build(config), root / name)
    hsa = CONFIG.replace(windows=(8, 8), hsa=sj.HSAConfig(layers=(1,), memory_layers=(0,), chunk_size=4))
    sj.save_safetensors(build(hsa), root / "hsa")
    return root


@pytest.fixture
def run(folder, capsys):
    """run(*arguments, model=, command=) -> (exit status, stdout, stderr), in this process."""

    def call(*arguments, model="plain", command=find_heads):
        status = command.main(["command", "--compilation_cache=", f"--model={folder / model}", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.parametrize("method", ["duo_attention", "razor_attention"])
def test_the_cache_reads_what_the_command_writes(run, folder, tmp_path, method):
    file = tmp_path / "new" / "heads.json"
    status, out, err = run(f"--method={method}", f"--output={file}", *SMALL, "--induction=0.2")
    assert status == 0, err
    found = json.loads(file.read_text())
    assert (found["method"], found["model"], np.shape(found["gates"])) == (method, "plain", (2, 2))
    assert 0 <= np.min(found["gates"]) <= np.max(found["gates"]) <= 1
    far = int((np.array(found["gates"]) >= 0.5).sum())
    assert found["full"] == far / 4
    assert f"{far} of 4 key heads look far back; gates: {file}" in out
    if method == "duo_attention":
        assert "step 3 of 3: loss 0." in out
        assert (found["steps"], found["seq_len"], found["sinks"], found["recent"]) == (3, 224, 4, 16)
    else:
        assert "55 tokens 4 times: best echo score" in out
        assert np.shape(found["echo"]) == np.shape(found["induction"]) == (2, 4)
        scores = HeadScores(np.array(found["echo"]), np.array(found["induction"]))
        gates, _ = protected_heads(scores, CONFIG.expand(), echo=0.01, induction=0.2)
        np.testing.assert_allclose(found["gates"], gates, atol=1e-5)
    spec = out.splitlines()[-1].partition("--cache=")[2]
    name, options = sj.kv.parse_preset(spec)
    cache = sj.kv.preset(name, **options, capacity=64)
    assert [len(heads) for layer in cache for heads, cascade in layer.groups if cascade.slots == 64] == [
        n for n in (np.array(found["gates"]) >= 0.5).sum(1).tolist() if n
    ]
    sj.init_state(sj.load(folder / "plain"), cache)


def test_ctrl_c_writes_the_gates_as_they_are(run, tmp_path, monkeypatch):
    """The signal comes while the second of a thousand steps is made ready."""
    asked, rows = [], RecallRows.__getitem__

    def interrupted(self, index):
        asked.append(index)
        if len(asked) == 2:
            signal.raise_signal(signal.SIGINT)
        return rows(self, index)

    monkeypatch.setattr(RecallRows, "__getitem__", interrupted)
    status, out, _ = run(f"--output={tmp_path / 'heads.json'}", *SMALL, "--steps=1000")
    assert status == 130
    assert "step 2 of 1000: loss" in out
    found = json.loads((tmp_path / "heads.json").read_text())
    assert found["steps"] == 2
    assert 0.9 < np.mean(found["gates"]) < 1


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("hsa", [], "the model reads a chunk memory (HSA)"),
        ("windows", [], "every layer of the model has a sliding window of its own"),
        ("windows", ["--method=razor_attention"], "every layer of the model has a sliding window of its own"),
        ("nothing", [], "no model folder"),
        ("plain", ["--seq_len=300"], "rows of 300 tokens: more are needed than 384 sinks and recent ones"),
        ("plain", ["--seq_len=16"], "rows of 16 tokens hold no question with its answer"),
        ("plain", ["--steps=0"], "GateConfig.steps is 0: it must be a whole number of at least 1"),
        ("plain", ["--method=razor_attention", "--tokens=1"], "2 tokens, 2 repeats and 1 row are the least"),
        ("plain", ["--method=razor_attention", "--echo=1.5"], "must be in [0, 1]"),
    ],
)
def test_errors_are_one_line(run, tmp_path, model, arguments, message):
    status, out, err = run(f"--output={tmp_path / 'heads.json'}", *arguments, model=model)
    line = err.splitlines()[-1]
    assert status == 1
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in err
    assert "look far back" not in out
    assert not list(tmp_path.iterdir())


def test_flags_that_are_wrong_are_told(run):
    status, _, err = run("--method=duo")
    assert status == 2
    assert err.count("\n") == 1
    assert "duo_attention" in err
    status, _, err = run("--chunk_size=8")
    assert status == 2
    assert "chunk_size" in err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("deeper", "2 caches for 3 layers; give one for all, or one a layer"),
        ("wider", "HeadGroups places 2 key heads, the model's layers have 4"),
    ],
)
@pytest.mark.parametrize("cache", ["duo_attention", "razor_attention", "lserve"])
def test_gates_of_another_model_are_refused_in_one_line(run, tmp_path, model, message, cache):
    (tmp_path / "heads.json").write_text('{"gates": [[0.9, 0.1], [0.2, 0.8]]}')
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 4)
    status, _, err = run(
        f"--input={tmp_path / 'text.txt'}", f"--cache={cache}:heads={tmp_path / 'heads.json'}", "--json=", "--png=",
        model=model, command=perplexity,
    )  # fmt: skip
    assert status == 1
    assert err == f"error: {message}\n"
