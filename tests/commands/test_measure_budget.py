"""`python -m train.measure_budget`: a file that the caches read, errors of one line."""

import pytest

import streamjax as sj
from streamjax.commands import measure_budget, perplexity
from tests.commands.test_find_heads import folder, run  # noqa: F401


@pytest.mark.parametrize("budget", ["cake", pytest.param("d2o", marks=pytest.mark.slow)])
def test_the_cache_reads_what_the_command_writes(run, folder, tmp_path, budget):  # noqa: F811
    file = tmp_path / "new" / "budget.safetensors"
    status, out, err = run(f"--budget={budget}", f"--output={file}", "--max_tokens=64", command=measure_budget)
    assert status == 0, err
    assert f"use them: --cache={budget}:calibration={file}" in out
    sizes = [int(word) for word in out.splitlines()[0].partition("keep: ")[2].split(", ")]
    assert sum(sizes) == 200
    cache = f"--cache={budget}:calibration={file},window=8,size=16,every=32"
    status, _, err = run(cache, "--max_tokens=96", model="deeper", command=perplexity)
    assert status == 1
    assert "error: this calibration is of model" in err
    state = sj.init_state(sj.load(folder / "plain"), sj.kv.preset(budget, calibration=file))
    assert len(set(state.caches)) == 2 or sizes == [100, 100]
    assert len(sj.kv.Calibration.load(file).table) == 2


def test_nonsense_is_one_line(run, tmp_path):  # noqa: F811
    for flags, message in (
        (("--budget=pyramid",), "value should be one of <cake|prefix_kv|d2o>"),
        (("--queries=0",), "queries"),
        ((f"--input={tmp_path}/none.txt",), "none.txt"),
    ):
        status, _, err = run(*flags, f"--output={tmp_path}/x", command=measure_budget)
        assert status in (1, 2)
        assert message in err.splitlines()[0]
