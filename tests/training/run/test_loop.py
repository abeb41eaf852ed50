"""Whole runs: killed and resumed ones end with the same bits, and nothing goes wrong silently."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.checkpoints import RunCheckpoints
from streamjax.training import (
    BackpropConfig,
    LoRAConfig,
    MeshConfig,
    RunStopped,
    TrainState,
    apply_overrides,
    evaluate,
    train,
)
from streamjax.training.run.goodput import Goodput
from streamjax.training.run.loop import _Run
from tests.covering import rest_slow

CLOCKS = {"tokens_per_second", *Goodput().metrics()}


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: nothing is saved."""


pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): run `action` after step n, once."""
    advance = _Run.advance
    actions = {}

    def advance_then_act(run):
        advance(run)
        if run.step in actions:
            actions.pop(run.step)()

    monkeypatch.setattr(_Run, "advance", advance_then_act)
    return actions.__setitem__


def kill():
    raise Killed


def same_bits(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def read_metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory):
    """A run that nothing disturbed: its state by configuration, and its folder."""
    done = {}

    def run(config):
        key = json.dumps(config.to_json_dict())
        if key not in done:
            workdir = tmp_path_factory.mktemp("reference")
            done[key] = train(config, workdir), workdir
        return done[key]

    return run


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(run_config, reference, at_step, tmp_path):
    expected, workdir = reference(run_config)
    for step in (2, 7, 9):
        at_step(step, kill)
        with pytest.raises(Killed):
            train(run_config, tmp_path)
        assert (RunCheckpoints(tmp_path / "checkpoints").latest_step or 0) == step // 4 * 4
    # A process that died while it saved leaves half a checkpoint, and half a line.
    (tmp_path / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    state = train(run_config, tmp_path)
    assert isinstance(state, TrainState)
    assert int(state.step) == 12
    assert same_bits(state, expected)
    assert read_metrics(tmp_path) == read_metrics(workdir)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run_config, reference, at_step, tmp_path):
    expected, workdir = reference(run_config)
    at_step(9, kill)
    with pytest.raises(Killed):
        train(run_config, tmp_path)
    os.truncate(tmp_path / "checkpoints" / "8" / "arrays" / "_METADATA", 10)
    with pytest.raises(ValueError, match=r"step 8 is damaged: .*/8/arrays/_METADATA has 10 bytes.* --resume_from=4$"):
        train(run_config, tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint of step 5; there is 4, 8"):
        train(run_config, tmp_path, resume_from=5)
    assert same_bits(train(run_config, tmp_path, resume_from=4), expected)
    assert read_metrics(tmp_path) == read_metrics(workdir)
    assert (tmp_path / "checkpoints_set_aside" / "8").is_dir()


@pytest.mark.slow
def test_streams_go_on_where_a_killed_run_left_them(run_config, reference, at_step, tmp_path):
    """The cache is in the checkpoint, and each row of the next batch continues that row's stream."""
    config = dataclasses.replace(
        run_config,
        data=dataclasses.replace(run_config.data, packing="streams"),
        optimizer=dataclasses.replace(run_config.optimizer, accumulation=1),
        backprop=BackpropConfig(carry_state=True, cache="streaming_llm:sinks=2,window=46", chunk_size=20),
    )
    expected, workdir = reference(config)
    assert expected.stream.seen.tolist() == [12 * 32] * 4
    at_step(9, kill)
    with pytest.raises(Killed):
        train(config, tmp_path)
    state = train(config, tmp_path)
    assert same_bits(state, expected)
    assert read_metrics(tmp_path) == read_metrics(workdir)
    batches = list(sj.data.make_eval_batches(config.data, config.eval_batches))
    stream = sj.init_state(state.model, config.backprop.built_cache(), 4)
    found = evaluate(state.model, batches, stream=stream, chunk_size=20)
    assert found["eval_loss"] == read_metrics(workdir)[-1]["eval_loss"]
    with pytest.raises(ValueError, match=r"config.backprop.cache=.*window=46', not .*window=45'"):
        train(apply_overrides(config, [("backprop.cache", "streaming_llm:sinks=2,window=45")]), tmp_path)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_first(run_config, reference, at_step, tmp_path, number, code):
    expected, _ = reference(run_config)
    before = signal.getsignal(number)
    at_step(5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(RunStopped, match="saved step 5 of 12; the same command continues") as stopped:
        train(run_config, tmp_path)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before
    assert RunCheckpoints(tmp_path / "checkpoints").latest_step == 5
    assert same_bits(train(run_config, tmp_path), expected)


def test_metrics_evaluation_and_export(run_config, reference):
    state, workdir = reference(run_config)
    metrics = read_metrics(workdir)
    steps = [(line["step"], "loss" in line) for line in metrics]
    assert [step for step, trained in steps if trained] == [3, 4, 6, 8, 9, 12]  # each log and each checkpoint
    assert [step for step, trained in steps if not trained] == [6, 12]
    assert metrics[-2]["loss"] < metrics[0]["loss"]
    last = metrics[-1]
    assert last["eval_bits_per_byte"] == pytest.approx(last["eval_loss"] / math.log(2))
    assert last["eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]))
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "train_config.json").read_text()) == run_config.to_json_dict()
    model = sj.load(workdir / "model")
    tokens = np.arange(20, dtype=np.int32)[None] + 97
    np.testing.assert_array_equal(sj.forward(model, tokens), sj.forward(state.model, tokens))


def test_evaluation_is_the_mean_over_the_validation_split(run_config, reference):
    state, workdir = reference(run_config)
    total = weight = 0.0
    for batch in sj.data.make_eval_batches(run_config.data, run_config.eval_batches):
        logits = np.asarray(sj.forward(state.model, batch["tokens"]), np.float64)
        chosen = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        total += np.sum((np.log(np.sum(np.exp(logits), axis=-1)) - chosen) * batch["weights"])
        weight += np.sum(batch["weights"])
    assert read_metrics(workdir)[-1]["eval_loss"] == pytest.approx(total / weight, rel=1e-5)


def test_a_finished_run_has_nothing_to_do(run_config, reference):
    state, workdir = reference(run_config)
    assert same_bits(train(run_config, workdir), state)


@pytest.mark.slow
def test_a_run_may_move_to_other_devices(run_config, reference, at_step, tmp_path):
    expected, _ = reference(run_config)
    sharded = dataclasses.replace(run_config, mesh=MeshConfig(data=2, context=2, fsdp=-1))
    at_step(5, kill)
    with pytest.raises(Killed):
        train(sharded, tmp_path)
    state = train(run_config, tmp_path)
    assert int(state.step) == 12
    for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(expected.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-3)


@pytest.mark.slow
def test_a_run_may_go_on_with_another_number_of_processes(run_config, reference, at_step, tmp_path, monkeypatch):
    """As if two processes had saved it: their places in the input are of no use to one, which reads up to there."""
    expected, workdir = reference(run_config)
    at_step(9, kill)
    with monkeypatch.context() as patch:
        patch.setattr("streamjax.training.run.loop.gather_json", lambda value: [value, value])
        with pytest.raises(Killed):
            train(run_config, tmp_path)
    assert same_bits(train(run_config, tmp_path), expected)
    assert read_metrics(tmp_path) == read_metrics(workdir)


def test_a_workdir_keeps_its_configuration(run_config, reference, tmp_path):
    _, workdir = reference(run_config)
    other = apply_overrides(run_config, [("optimizer.learning_rate", "1.0")])
    with pytest.raises(ValueError, match=r"config.optimizer.learning_rate=0.01, not 1.0: choose another --workdir"):
        train(other, workdir)
    train(apply_overrides(run_config, [("log_interval", "5"), ("eval_batches", "1")]), workdir)


@pytest.mark.parametrize("name", ["model", "adapters"])
def test_a_model_that_no_run_has_made_is_not_replaced(run_config, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_text("somebody's")
    with pytest.raises(ValueError, match=rf"^{tmp_path / name} is there, and no run has made it; .*another --workdir$"):
        train(run_config, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_pretrained_model_of_other_tokens_is_not_trained_on_bytes(run_config, tmp_path):
    other = run_config.model.replace(vocab_size=2048)
    sj.save_hf(jax.jit(lambda key: sj.Decoder(other, key))(jax.random.key(0)), tmp_path / "m")
    config = dataclasses.replace(run_config, model=None, init_from=str(tmp_path / "m"))
    with pytest.raises(ValueError, match=r"^config\.init_from=.*: set config\.data\.tokenizer .*2,048 ids"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("content", ["", "[]", '{"steps": NaN}'])
def test_a_configuration_that_is_damaged_is_named(run_config, tmp_path, content):
    (tmp_path / "train_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"train_config\.json: ") as caught:
        train(run_config, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_workdir_from_before_the_group_backprop(run_config, reference, tmp_path):
    """Its configuration has `method` at the top: it goes on with the same method, and with no other."""
    _, workdir = reference(run_config)
    shutil.copytree(workdir, tmp_path / "old")
    file = tmp_path / "old" / "train_config.json"
    values = json.loads(file.read_text())
    values["method"] = values.pop("backprop")["method"]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config.backprop.method='full', not 'remat': choose another --workdir"):
        train(apply_overrides(run_config, [("backprop.method", "remat")]), tmp_path / "old")
    train(run_config, tmp_path / "old")
    assert json.loads(file.read_text()) == run_config.to_json_dict()


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(run_config, tmp_path):
    wild = apply_overrides(
        run_config,
        [("optimizer.learning_rate", "1e38"), ("optimizer.warmup_steps", "6"), ("checkpoint_interval", "1")],
    )
    with pytest.raises(
        RunStopped, match=r"not finite .* step (\d+).*; the checkpoint of step (\d+) is good"
    ) as stopped:
        train(wild, tmp_path)
    assert stopped.value.exit_code == 1
    bad, good = (int(word) for word in re.findall(r"\d+", str(stopped.value)))
    assert RunCheckpoints(tmp_path / "checkpoints").latest_step == good == bad - 1
    assert not (tmp_path / "model").exists()


def test_training_goes_on_from_a_model(run_config, reference, tmp_path):
    _, workdir = reference(run_config)
    config = dataclasses.replace(run_config, model=None, init_from=str(workdir / "model"), steps=1, eval_interval=1)
    config = apply_overrides(config, [("optimizer.learning_rate", "1e-9"), ("dtype", "bfloat16")])
    state = train(config, tmp_path)
    assert state.model.dtype == "bfloat16"
    assert state.model.embedding[...].dtype == "float32"
    before, after = read_metrics(workdir)[-1], read_metrics(tmp_path)[-1]
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-2)


def test_a_damaged_model_is_not_trained(run_config, tmp_path):
    model = sj.Decoder(run_config.model, jax.random.key(0))
    down = model.layers[0].mlp.down
    down[...] = down[...].at[0, 1].set(np.inf)
    sj.save_safetensors(model, tmp_path / "damaged")
    config = dataclasses.replace(run_config, model=None, init_from=str(tmp_path / "damaged"))
    with pytest.raises(ValueError, match=r"damaged: layers\.0\.mlp\.down has 1 of [\d,]+ values that are not finite"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_said_before_anything_runs(run_config, tmp_path):
    for field, value, message in (
        ("model.vocab_size", "100", "the model's vocab_size is 100; tokenizer 'bytes' needs 259"),
        ("mesh.fsdp", "3", "does not fit 8 devices"),
    ):
        with pytest.raises(ValueError, match=message):
            train(apply_overrides(run_config, [(field, value)]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "text").mkdir()
    for index in range(30):
        (tmp_path / "text" / f"{index:02}.txt").write_text("a few words that soon end\n")
    with pytest.raises(ValueError, match=r"the data ends after \d steps: set config.data.epochs=none"):
        train(
            apply_overrides(run_config, [("data.epochs", "1"), ("data.source", str(tmp_path / "text"))]),
            tmp_path / "run",
        )


def test_adapters_are_trained_killed_resumed_and_exported(run_config, reference, at_step, tmp_path):
    """Adapters on a model of an earlier run; its own weights come out as they went in."""
    base = reference(run_config)[1] / "model"
    config = dataclasses.replace(
        run_config, model=None, init_from=str(base), lora=LoRAConfig(rank=2, targets=("q", "v", "down"))
    )
    expected, workdir = reference(config)
    at_step(9, kill)
    with pytest.raises(Killed):
        train(config, tmp_path)
    assert same_bits(train(config, tmp_path), expected)
    assert read_metrics(workdir)[-1]["eval_loss"] < read_metrics(reference(run_config)[1])[-1]["eval_loss"]
    frozen = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(expected.model) if "_lora" not in str(path)]
    assert same_bits(frozen, jax.tree.leaves(sj.load(base)))
    tokens = np.arange(20)[None] + 65
    logits = sj.forward(expected.model, tokens)
    np.testing.assert_allclose(sj.forward(sj.load(workdir / "model"), tokens), logits, atol=1e-4)
    np.testing.assert_allclose(sj.forward(sj.load_lora(sj.load(base), workdir / "adapters"), tokens), logits, atol=1e-4)
    with pytest.raises(ValueError, match=r"config.lora.rank=2, not 3: choose another --workdir"):
        train(apply_overrides(config, [("lora.rank", "3")]), tmp_path)


def test_adapters_that_make_no_sense(run_config):
    with pytest.raises(ValueError, match=r"lora.rank is 4, and adapters need a pretrained model: set init_from"):
        dataclasses.replace(run_config, lora=LoRAConfig(rank=4))
    with pytest.raises(ValueError, match="unknown LoRA target 'query': choose from q, k, v"):
        LoRAConfig(rank=4, targets=("query",))
    found = apply_overrides(LoRAConfig(rank=4), [("targets", "('o', 'up')"), ("alpha", "3")])
    assert (found.targets, found.scale) == (("o", "up"), 3.0)


@pytest.mark.parametrize("rate", rest_slow(["1e38", "1e30"], "1e38"))
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(run_config, tmp_path, rate):
    """The last update is the one that spoils them: no step comes behind it whose loss would tell."""
    wild = apply_overrides(
        run_config, [("optimizer.learning_rate", rate), ("optimizer.warmup_steps", "1"), ("checkpoint_interval", "1")]
    )
    message = r"the weights are not finite after step 2, nor is their norm; the checkpoint of step 1 is good$"
    with pytest.raises(RunStopped, match=message) as stopped:  # the first step of a warm-up changes nothing
        train(apply_overrides(wild, [("steps", "2")]), tmp_path)
    assert stopped.value.exit_code == 1
    assert RunCheckpoints(tmp_path / "checkpoints").steps == [1]
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_whose_next_loss_is_not_finite_is_not_called_good(run_config, at_step, tmp_path, monkeypatch):
    every = apply_overrides(run_config, [("checkpoint_interval", "2"), ("log_interval", "1")])
    report = _Run.report

    def spoiled(run):
        if run.step == 5:
            run.pending[-1] = {**run.pending[-1], "loss": np.float32(np.nan)}
        report(run)

    monkeypatch.setattr(_Run, "report", spoiled)
    leads_here = "the checkpoint of step 2 is good, and that of step 4 leads here again: --resume_from=2"
    with pytest.raises(RunStopped, match=f"not finite at step 5; {leads_here}$"):
        train(every, tmp_path)


def test_two_runs_in_one_workdir(run_config, at_step, tmp_path):
    said = []

    def another():
        with pytest.raises(ValueError, match=r"another run is at work in .*: wait for it, stop it, or choose") as error:
            train(run_config, tmp_path / "run")
        said.append(str(error.value))

    at_step(2, another)
    at_step(5, kill)
    with pytest.raises(Killed):
        train(run_config, tmp_path / "run")
    assert len(said) == 1
    assert int(train(run_config, tmp_path / "run").step) == 12  # a run that died leaves no lock behind


def test_processes_without_a_mesh_are_refused(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"2 processes without a mesh would train .* apart: .*config\.mesh\.data=8"):
        train(run_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_a_run_starts_leaves_nothing(run_config, tmp_path, monkeypatch, number):
    """As the command has it: the signal raises, here while the input is opened."""

    def interrupted(*args, **options):
        raise KeyboardInterrupt(number)

    monkeypatch.setattr("streamjax.training.run.feeds.make_train_iterator", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
