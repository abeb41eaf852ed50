"""Runs on conversations, pairs and prompts: killed and resumed ones end with the same bits, and say what they found."""

import dataclasses
import itertools
import json
import os
import re
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import streamjax as sj
from streamjax.data.conversations.prepared import prepare_examples
from streamjax.training import (
    DPO,
    GRPO,
    LoRAConfig,
    MeshConfig,
    OptimizerConfig,
    RolloutConfig,
    RunStopped,
    TrainConfig,
    apply_overrides,
    loss_and_grad,
    train,
)
from streamjax.training.post_training import reference
from tests.covering import rest_slow
from tests.training.conftest import CONFIG
from tests.training.gradient_checks import random_model
from tests.training.run.test_loop import Killed, at_step, kill, read_metrics, same_bits  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("compilation_cache")
WORDS = ["ja", "nein", "doch", "so", "hm", "ah", "aha", "oh"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A folder for each kind of records, with two splits of a dozen."""
    root = tmp_path_factory.mktemp("records")
    for split, words in (("train", WORDS), ("valid", WORDS[::-1])):
        kinds = {
            "conversations": [
                {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
                for a, b in itertools.pairwise(words)
            ],
            "preferences": [{"prompt": a + "?", "chosen": b, "rejected": b + b} for a, b in itertools.pairwise(words)],
            "prompts": [{"prompt": a, "reference": a} for a in words],
        }
        for kind, lines in kinds.items():
            (root / kind).mkdir(exist_ok=True)
            (root / kind / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(autouse=True)
def data_dir(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("data_dir")
    monkeypatch.setenv("STREAMJAX_DATA_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    sj.save_hf(random_model(CONFIG.replace(vocab_size=259, num_layers=1), "float32"), folder)
    return folder


@pytest.fixture
def runs(records, base):
    """A run of 6 steps for each kind: adapters for pairs and prompts, all weights for conversations."""

    def data(kind, **fields):
        packing = "pack" if kind == "conversations" else "rows"
        truncation = "drop" if kind == "prompts" else "end"
        return sj.data.DataConfig(
            source=str(records / kind), format=kind, packing=packing, truncation=truncation, seq_len=32, batch_size=4,
            **fields,
        )  # fmt: skip

    sft = TrainConfig(
        name="test",
        model=None,
        init_from=str(base),
        data=data("conversations"),
        steps=6,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        log_interval=2,
        eval_interval=3,
        eval_batches=2,
        checkpoint_interval=3,
    )
    lora = LoRAConfig(rank=2, targets=("q", "v", "down"))
    rollouts = RolloutConfig(
        rewards=("regex:[a-z]", "length:4"), reward_weights=(1.0, 0.5), group_size=2, max_new_tokens=8, updates=2
    )
    return {
        "sft": sft,
        "dpo": dataclasses.replace(sft, data=data("preferences"), objective=DPO(beta=0.5), lora=lora),
        "grpo": dataclasses.replace(sft, data=data("prompts"), objective=GRPO(), rollouts=rollouts, lora=lora),
    }


@pytest.mark.usual("grpo")
@pytest.mark.parametrize("kind", rest_slow(["sft", "dpo", "grpo"], "dpo", "grpo"))  # a run of test_loop.py is as "sft"
def test_killed_and_stopped_runs_end_with_the_same_bits(runs, kind, at_step, tmp_path):  # noqa: F811
    """Answers that more steps were to learn from, and those that were written again, are the same."""
    expected = train(runs[kind], tmp_path / "undisturbed")
    at_step(2, kill)
    with pytest.raises(Killed):
        train(runs[kind], tmp_path / "run")
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(RunStopped, match="saved step 5 of 6"):
        train(runs[kind], tmp_path / "run")
    assert same_bits(train(runs[kind], tmp_path / "run"), expected)
    undisturbed, found = (
        {line["step"]: line for line in read_metrics(tmp_path / name) if "loss" not in line or line["step"] in (4, 6)}
        for name in ("undisturbed", "run")
    )
    assert undisturbed[6] == found[6]
    if kind == "grpo":
        lines = [(tmp_path / name / "samples.jsonl").read_text() for name in ("undisturbed", "run")]
        assert lines[0] == lines[1]
        assert [json.loads(line)["step"] for line in lines[0].splitlines()] == [0, 0, 2, 2, 4, 4]


def test_pairs_are_compared_with_the_model_at_the_start(runs, base, tmp_path, data_dir, monkeypatch):
    """The loss begins at log 2, the numbers on disk are those of the model, and another run takes them from there."""
    config = dataclasses.replace(runs["dpo"], steps=2, log_interval=1)
    train(config, tmp_path / "one")
    metrics = read_metrics(tmp_path / "one")
    assert metrics[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert metrics[-1]["eval_margin"] == pytest.approx(
        metrics[-1]["eval_chosen_reward"] - metrics[-1]["eval_rejected_reward"], rel=1e-4
    )
    model = sj.load(base, jnp.float32)
    stored = sorted((data_dir / "reference_logp").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for split, file in zip(("train", "validation"), stored, strict=True):
        texts = [text for pair in prepare_examples(config.data, split).texts for text in pair]
        rows = np.zeros((len(texts), 33), np.int32)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text.ids)] = text.ids
        logits = np.asarray(sj.forward(model, rows), np.float64)
        logp = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        expected = [
            sum(logp[row, i, text.ids[i + 1]] for i in np.flatnonzero(text.learnt[1:]))
            for row, text in enumerate(texts)
        ]
        np.testing.assert_allclose(np.load(file).reshape(-1), expected, rtol=1e-5)
    monkeypatch.setattr(reference, "_write", None)  # nothing is written again
    train(config, tmp_path / "two")
    assert read_metrics(tmp_path / "two") == metrics
    base_weights = dataclasses.replace(config, reference="base")
    train(base_weights, tmp_path / "three")
    for one, three in zip(metrics, read_metrics(tmp_path / "three"), strict=True):
        assert three == pytest.approx(one, rel=1e-3, abs=1e-5)
    monkeypatch.undo()
    monkeypatch.setenv("STREAMJAX_DATA_DIR", str(data_dir))
    os.truncate(stored[0], 70)  # what is damaged is computed again
    train(config, tmp_path / "four")
    assert read_metrics(tmp_path / "four") == metrics


def test_the_key_is_of_the_model_and_of_the_pairs(base, tmp_path):
    key = reference.reference_key(str(base), {"pairs": "a"})
    assert key == reference.reference_key(str(base), {"pairs": "a"})
    assert key != reference.reference_key(str(base), {"pairs": "b"})
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert key == reference.reference_key(str(other), {"pairs": "a"})
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert key != reference.reference_key(str(other), {"pairs": "a"})


def test_what_a_rollout_measures_is_what_its_answers_say(runs, tmp_path):
    settings = dataclasses.replace(runs["grpo"].rollouts, samples=2, updates=1)
    config = dataclasses.replace(runs["grpo"], steps=2, log_interval=1, rollouts=settings)
    train(config, tmp_path)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert next(line["kl"] for line in lines) == pytest.approx(0, abs=1e-6)
    for step, line in enumerate(lines):
        said = [sample for sample in samples if sample["step"] == step]
        assert len(said) == 4
        assert {sample["prompt"] for sample in said} <= set(WORDS)
        for sample in said:
            assert sample["reward/regex:[a-z]"] == float(any(c.isascii() and c.islower() for c in sample["answer"]))
            assert sample["reward"] == sample["reward/regex:[a-z]"] + 0.5 * sample["reward/length:4"]
        assert line["reward"] == pytest.approx(np.mean([sample["reward"] for sample in said]))
        assert line["reward/length:4"] == pytest.approx(np.mean([sample["reward/length:4"] for sample in said]))
    assert "eval_reward" in read_metrics(tmp_path)[-1]
    board = scalars(tmp_path / "tensorboard")
    for name in ("reward", "reward/length:4", "kl", "loss"):  # TensorBoard has no ":"
        shown = board[name.replace(":", "_")]
        assert shown == pytest.approx({line["step"]: line[name] for line in lines}), name


def scalars(folder):
    """What TensorBoard would show, by name and step: length, checksum, event, checksum, and so on."""
    found = {}
    for file in folder.iterdir():
        content = file.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("sft", {"objective.label_smoothing": "2"}, "CrossEntropy.label_smoothing is 2.0: it must be"),
        ("dpo", {"data.batch_size": "3"}, "data.batch_size 3 is no multiple of 2: DPO has pairs"),
        ("dpo", {"data.format": "prompts", "data.truncation": "drop"}, "DPO needs data.format 'preferences'"),
        ("dpo", {"reference": "base", "lora.rank": "0"}, "set lora.rank, or reference to"),
        ("grpo", {"rollouts.group_size": "3"}, "data.batch_size 4 is no multiple of rollouts.group_size 3"),
        ("grpo", {"rollouts.max_new_tokens": "32"}, "leaves no room for a prompt in data.seq_len 32"),
        ("grpo", {"rollouts.rewards": "('speed',)"}, "unknown reward 'speed': use exact_match, regex:PATTERN"),
        ("grpo", {"rollouts.rewards": "('regex:(',)"}, "no regular expression"),
        ("grpo", {"rollouts.rewards": "('no_such:f',)"}, "cannot be imported"),
        ("grpo", {"rollouts.rewards": "('math:f',)"}, "has no function 'f'"),
        ("grpo", {"rollouts.rewards": "('math:sin',)"}, "'math:sin' failed: TypeError"),
        ("grpo", {"rollouts.rewards": "('exact_match', 'length:3', 'length:4')"}, "has 2 weights for 3 rewards"),
        ("grpo", {"rollouts.cache": "nothing"}, "nothing"),
    ],
)
def test_what_makes_no_sense_is_one_line(runs, tmp_path, kind, changes, message):
    if "rollouts.rewards" in changes and "2 weights" not in message:
        changes = {**changes, "rollouts.reward_weights": "()"}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        train(apply_overrides(runs[kind], changes.items()), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_run_keeps_its_objective(runs, tmp_path):
    train(dataclasses.replace(runs["dpo"], steps=1), tmp_path)
    other = dataclasses.replace(runs["dpo"], steps=1, objective=DPO(beta=0.7))
    with pytest.raises(ValueError, match=r"config.objective.beta=0.5, not 0.7: choose another --workdir"):
        train(other, tmp_path)


def test_packed_conversations_cost_what_they_cost_apart(runs, base):
    """Neither attention nor positions reach from one conversation to the next."""
    packed = dataclasses.replace(runs["sft"].data, batch_size=8, seq_len=48)
    model = sj.load(base, jnp.float32)
    losses, counts = [], []
    for data in (packed, dataclasses.replace(packed, packing="rows")):
        [batch] = sj.data.make_eval_batches(data, 9)
        assert ("segment_ids" in batch) == (data.packing == "pack")
        losses.append(float(loss_and_grad(model, batch)[0]))
        counts.append(batch["weights"].sum())
    assert counts[0] == counts[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


OVER_CONTEXT = [("mesh.context", "2"), ("mesh.tensor", "2"), ("mesh.data", "2")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize(
    "changes",
    [
        [("backprop.method", "remat"), ("scan_layers", "true")],
        [("backprop.method", "layer"), ("backprop.chunk_size", "8")],
        [("backprop.method", "chunk"), ("backprop.chunk_size", "8")],
        [("lora.rank", "0")],
        [("lora.rank", "2"), ("weights", "int8")],
        [("optimizer.accumulation", "2")],
        [("mesh.data", "2"), ("mesh.fsdp", "2"), ("mesh.tensor", "2")],
        [*OVER_CONTEXT, ("backprop.method", "remat")],
        [*OVER_CONTEXT, ("backprop.chunk_size", "8"), ("backprop.method", "layer")],
    ],
    ids=lambda changes: "-".join(value + name for name, value in (changes[0], changes[-1])),
)
def test_every_way_to_train(runs, kind, changes, tmp_path):
    """Finite losses, and those of the plain way but where weights are quantised or others are trained."""
    config = dataclasses.replace(runs[kind], steps=2, log_interval=1, eval_batches=1)
    expected = [line["loss"] for line in read_metrics_of(config, tmp_path / "plain")]
    found = [line["loss"] for line in read_metrics_of(apply_overrides(config, changes), tmp_path / "other")]
    assert np.isfinite(found).all()
    if not any(name in ("lora.rank", "weights") for name, _ in changes):
        np.testing.assert_allclose(found[:1], expected[:1], rtol=1e-3, atol=1e-3)


def read_metrics_of(config, workdir):
    train(config, workdir)
    return [line for line in read_metrics(workdir) if "loss" in line]


@pytest.mark.slow
def test_rollouts_with_another_cache_and_without_a_penalty(runs, tmp_path):
    config = apply_overrides(
        runs["grpo"], [("rollouts.cache", "streaming_llm:sinks=2,window=6"), ("objective.kl", "0"), ("steps", "2")]
    )
    assert "kl" not in read_metrics_of(config, tmp_path)[-1]


@pytest.mark.slow
def test_a_mesh_writes_the_answers_of_one_device(runs, tmp_path):
    config = dataclasses.replace(runs["grpo"], steps=1, log_interval=1)
    train(config, tmp_path / "one")
    train(dataclasses.replace(config, mesh=MeshConfig(data=2, tensor=2, fsdp=2)), tmp_path / "mesh")
    lines = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "mesh")]
    assert lines[0] == lines[1]
