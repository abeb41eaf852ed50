"""Rows of a long benchmark: an ended run goes on behind them, and another one does not take them for its own."""

import json

import pytest

from benchmarks.reporting import Record, table


@pytest.mark.quick
def test_a_run_that_was_ended_goes_on(tmp_path, capsys):
    path = tmp_path / "new" / "rows.json"
    first = Record("serving/x", path, tokens=3)
    first.add({"text": "chat", "rows": 1, "a pass": 1.5})
    assert json.loads(path.read_text())["unfinished"] is True
    second = Record("serving/x", path, tokens=3)
    assert second.has(text="chat", rows=1)
    assert not second.has(text="chat", rows=2)
    assert "goes on behind 1 rows" in capsys.readouterr().err
    assert Record("serving/x", path, tokens=4).rows == Record("serving/x", path, resumes=False, tokens=3).rows == []
    second.add({"text": "chat", "rows": 2, "a pass": 1.2})
    second.finish(note="both")
    written = json.loads(path.read_text())
    assert [row["rows"] for row in written["rows"]] == [1, 2]
    assert (written["note"], written["tokens"]) == ("both", 3)
    assert "unfinished" not in written
    assert Record("serving/x", path, tokens=3).rows == []  # that one is whole: this run is another


def test_a_table_has_the_columns_of_all_rows():
    rows = [{"a": 1, "c": 2.0}, {"a": 3, "b": 4, "c": 5.0}, {"a": 6, "d": 7}]
    assert table(rows).splitlines() == [
        "| a | b | c | d |",
        "|---|---|---|---|",
        "| 1 | - | 2 | - |",
        "| 3 | 4 | 5 | - |",
        "| 6 | - | - | 7 |",
    ]
