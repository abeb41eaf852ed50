"""A run's numbers against those of the library's own score; the picture and its marks."""

import json

import numpy as np
import pytest

import streamjax as sj
from streamjax.data import ByteTokenizer
from streamjax.evaluation import SlotMemory, Trial, human_bytes, log_bins, plot_trials, run_trial
from tests.streaming.tiny_models import build

CONFIG = sj.UniformConfig(
    vocab_size=259, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16, bos_token_id=256
)
TEXT = list(b"It was the best of times, it was the worst of times, it was the age of wisdom ...")


@pytest.fixture(scope="module")
def model() -> sj.Decoder:
    return build(CONFIG)


CACHE = sj.kv.preset("streaming_llm", sinks=2, window=10)


def session(model, cache=CACHE) -> sj.Session:
    return sj.Session(model, ByteTokenizer(), cache, chunk_size=16)


def test_a_run_costs_what_score_says(model):
    _, expected = sj.score(model, sj.init_state(model, CACHE), np.array([[256, *TEXT]]), chunk_size=16)
    seen = []
    trial = run_trial("s", session(model), TEXT, progress=lambda done, mean: seen.append((done, mean)))
    expected = np.asarray(expected)
    np.testing.assert_allclose(trial.nats, expected[0, 1:], atol=1e-5)
    assert trial.ended == ""
    assert [done for done, _ in seen] == [15, 31, 47, 63, 79, len(TEXT)]
    assert seen[-1][1] == pytest.approx(trial.nats.mean(), abs=1e-5)
    part = trial.part(10, 30)
    assert part.tokens == 20
    assert part.perplexity == pytest.approx(np.exp(expected[0, 11:31].mean()), rel=1e-5)
    assert part.bits_per_byte(2.0) == pytest.approx(expected[0, 11:31].mean() / np.log(2) / 2, rel=1e-5)
    assert trial.part(500).tokens == 0


def test_a_run_that_goes_on_begins_no_text(model):
    one = session(model)
    first, second = run_trial("a", one, TEXT[:31]), run_trial("b", one, TEXT[31:])
    whole = run_trial("c", session(model), TEXT)
    np.testing.assert_allclose(np.concatenate([first.nats, second.nats]), whole.nats, atol=1e-4)


def test_a_dense_run_ends_when_its_cache_is_full(model):
    cache = sj.kv.preset("dense", capacity=len(TEXT) + 1)  # BOS takes a place
    enough = run_trial("d", session(model, cache), TEXT)
    assert enough.ended == ""
    trial = run_trial("d", session(model, cache), [*TEXT, *TEXT[:7]])
    assert trial.ended == f"full at {len(TEXT) + 1} tokens"
    assert len(trial.nats) == len(TEXT)
    assert np.isfinite(trial.nats).all()
    assert trial.memory.slots == (len(TEXT) + 1,)
    np.testing.assert_allclose(trial.nats, enough.nats, atol=1e-5)


def test_a_run_ends_when_its_time_is_up(model):
    trial = run_trial("t", session(model), TEXT, seconds=0.0)
    assert trial.ended == "out of time at 15 tokens"
    assert len(trial.nats) == 15
    with pytest.raises(ValueError, match="the text is empty"):
        run_trial("t", session(model), [])


def made_up(name: str, count: int, level: float, ended: str = "") -> Trial:
    nats = np.full(count, np.log(level), np.float32)
    return Trial(name, nats, SlotMemory((count if ended else 500,), (100.0,)), ended, 1.0, 10.0, 1)


def test_a_run_is_plain_data():
    trial = made_up("x", 4000, 8.0)
    found = json.loads(json.dumps(trial.to_json_dict(bytes_per_token=3.0)))
    assert found["perplexity"] == pytest.approx(8)
    assert found["bits_per_byte"] == pytest.approx(1)
    assert found["cache_bytes"] == found["cache_bytes_in_use"] == 50_000
    assert [point["position"] for point in found["curve"]] == pytest.approx(log_bins(trial.nats)[0].tolist())
    assert found["curve"][0]["cache_bytes_in_use"] == 800
    assert {round(point["nats_per_token"], 4) for point in found["curve"]} == {round(np.log(8), 4)}


def test_the_picture_shows_every_run_and_where_one_stopped(tmp_path):
    trials = [made_up("dense", 2000, 20.0, "full at 2,000 tokens"), made_up("sinks", 9000, 5.0)]
    figure = plot_trials(trials, tmp_path / "new" / "p.png", title="a title", trained_length=512)
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")
    upper, lower = figure.axes
    assert [axis.get_xscale() + axis.get_yscale() for axis in figure.axes] == ["loglog", "loglog"]
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["dense", "sinks"]
    lines = {line.get_label(): line for line in upper.get_lines()}
    np.testing.assert_allclose(lines["dense"].get_ydata(), 20, rtol=1e-5)
    np.testing.assert_allclose(lines["sinks"].get_ydata(), 5, rtol=1e-5)
    marks = [line for axis in figure.axes for line in axis.get_lines() if line.get_marker() == "X"]
    assert [float(mark.get_xdata()[-1]) for mark in marks] == pytest.approx([lines["dense"].get_xdata()[-1], 2000])
    assert marks[1].get_ydata()[-1] == 200_000
    written = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert written == {"full at 2,000 tokens", "trained on 512 "}
    assert max(lower.get_lines()[-2].get_ydata()) == 50_000
    assert figure.get_suptitle() == "a title"


def test_a_text_of_a_few_training_lengths_has_an_even_axis(tmp_path):
    trials = [made_up("dense", 2000, 20.0, "gone at 2,000 tokens"), made_up("sinks", 6400, 5.0)]
    upper, lower = plot_trials(trials, None, trained_length=1500, even=True).axes
    assert [axis.get_xscale() + axis.get_yscale() for axis in (upper, lower)] == ["linearlog", "linearlog"]
    sinks = next(line for line in upper.get_lines() if line.get_label() == "sinks")
    np.testing.assert_allclose(np.diff(sinks.get_xdata()), 200)
    label = next(text for text in lower.texts if text.get_text().startswith("gone"))
    assert label.get_horizontalalignment() == "left"


def test_a_run_ends_where_it_is_told_to(model):
    costs = []

    def stop(nats):
        costs.append(nats)
        return "enough" if len(costs) == 3 else ""

    trial = run_trial("t", session(model), TEXT, stop=stop)
    assert trial.ended == f"enough at {len(trial.nats)} tokens"
    assert len(costs) == 3
    np.testing.assert_array_equal(np.concatenate(costs), trial.nats)


def test_bytes_in_words():
    assert [human_bytes(n) for n in (0, 999, 999.6, 1500, 2_110_000, 1e9, 3.2e13)] == [
        "0 B", "999 B", "1 kB", "1.5 kB", "2.11 MB", "1 GB", "32 TB",
    ]  # fmt: skip
