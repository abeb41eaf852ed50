"""Steps that are skipped: not finite, or spikes; counted, and so many in a row end a run."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.checkpoints import RunCheckpoints
from streamjax.training import OptimizerConfig, RunStopped, apply_overrides, make_optimizer, new_state, train
from streamjax.training.run import goodput
from streamjax.training.run.goodput import Goodput
from streamjax.training.run.loop import _Run
from streamjax.training.run.state import no_skips
from streamjax.training.run.step import make_train_step

pytestmark = pytest.mark.usefixtures("compilation_cache")


def plain(steps, factor):
    """Which of (loss, norm) are taken, and the counts behind them, in numbers."""
    taken, total, row, mean = [], 0, 0, None
    for loss, norm in steps:
        bad = not (np.isfinite(loss) and np.isfinite(norm))
        bad = bad or (factor is not None and mean is not None and norm > factor * mean)
        taken.append(not bad)
        total, row = total + bad, row + 1 if bad else 0
        if not bad:
            mean = norm if mean is None else 0.95 * mean + 0.05 * norm
    return taken, total, row


@pytest.mark.parametrize("factor", [None, 3.0])
def test_what_is_taken_and_what_is_counted(factor):
    nan, inf = float("nan"), float("inf")
    steps = [(1, 2), (nan, 1), (1, inf), (1, 2), (2, 7), (1, 8), (1, 2), (2, 9), (nan, nan)]
    skips, taken = no_skips(), []
    for loss, norm in steps:
        good, skips = skips.judge(jnp.float32(loss), jnp.float32(norm), factor)
        taken.append(bool(good))
    assert (taken, int(skips.total), int(skips.in_a_row)) == plain(steps, factor)


def test_a_skipped_step_changes_nothing_but_its_counters(model, batch):
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    step = make_train_step(optimizer)
    state = new_state(jax.tree.map(jnp.copy, model), optimizer, skipping=True)
    state, _ = step(state, batch)
    before = jax.device_get((state.model, state.opt_state))
    state, metrics = step(state, {**batch, "weights": np.full_like(batch["weights"], np.nan)})
    assert int(metrics["skipped_steps"]) == int(metrics["skipped_in_a_row"]) == 1
    for a, b in zip(jax.tree.leaves((state.model, state.opt_state)), jax.tree.leaves(before), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    state, metrics = step(state, batch)
    assert (int(metrics["skipped_steps"]), int(metrics["skipped_in_a_row"]), int(state.step)) == (1, 0, 3)


@pytest.fixture
def spoilt(monkeypatch):
    """spoilt(steps): batches of these steps, from 0, weigh their tokens by what is no number."""
    advance = _Run.advance

    def spoil(steps):
        def spoil_and_advance(run):
            give = run.feed.next

            def given(model, step):
                batch, measured = give(model, step)
                spoils = step in steps
                return {**batch, "weights": batch["weights"] * (np.nan if spoils else 1)}, measured

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run.feed, "next", given)
                advance(run)

        monkeypatch.setattr(_Run, "advance", spoil_and_advance)

    return spoil


def test_a_run_skips_so_many_in_a_row_and_then_stops(run_config, spoilt, tmp_path):
    config = dataclasses.replace(run_config, eval_interval=100)
    config = apply_overrides(config, [("optimizer.skip_nonfinite", "2")])
    spoilt((2, 5, 6))
    state = train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "loss" in line] == [1, 1, 2, 3, 3, 3]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert (int(state.skips.total), int(state.skips.in_a_row)) == (3, 0)
    stops = apply_overrides(config, [("optimizer.skip_nonfinite", "1")])
    message = r"^2 steps in a row, up to step 7, .*skip_nonfinite=1\); the checkpoint of step 4 is good$"
    with pytest.raises(RunStopped, match=message):
        train(stops, tmp_path / "stops")
    assert RunCheckpoints(tmp_path / "stops" / "checkpoints").steps == [4]


@pytest.mark.slow
def test_a_run_may_go_on_with_skipping_and_without(run_config, spoilt, tmp_path):
    config = dataclasses.replace(run_config, eval_interval=100)
    spoilt((5, 6))
    with pytest.raises(
        RunStopped, match=r"^the loss or its gradient is not finite at step 6; the checkpoint of step 4"
    ):
        train(config, tmp_path)
    skips = apply_overrides(config, [("optimizer.skip_nonfinite", "2")])
    assert int(train(skips, tmp_path).skips.total) == 2
    assert train(config, tmp_path, resume_from=8).skips is None


def test_a_spike_needs_leave_to_be_skipped():
    with pytest.raises(ValueError, match=r"^optimizer\.spike_factor is 3\.0, and no step may be skipped: set"):
        OptimizerConfig(spike_factor=3.0)
    with pytest.raises(ValueError, match=re.escape("OptimizerConfig.spike_factor is 1.0")):
        OptimizerConfig(spike_factor=1.0, skip_nonfinite=1)


def test_every_second_of_a_run_is_somewhere(monkeypatch):
    """With clocks that the test moves: a start, steps, a checkpoint, a kill ten minutes later, and another start."""
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "time", lambda: now[0])
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0] - 900.0)

    def passes(seconds):
        now[0] += seconds

    clock = Goodput()
    passes(20)
    clock.switch("steps")
    passes(60)
    with clock.spending("data"):
        passes(5)
    with clock.spending("checkpoints"):
        passes(2)
    saved = json.loads(json.dumps(clock.get_state()))
    passes(600)  # steps that are lost, and a machine that is away
    clock = Goodput()
    passes(15)
    clock.set_state(saved)
    clock.switch("steps")
    passes(40)
    found = clock.metrics()
    assert found == {
        "goodput": round(100 / 742, 4), "seconds_steps": 100, "seconds_data": 5, "seconds_evaluation": 0,
        "seconds_checkpoints": 2, "seconds_start": 35, "seconds_restarts": 600,
    }  # fmt: skip
