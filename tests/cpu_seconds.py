"""What tests take: at the end of a run, its CPU seconds and the dearest tests of those that take more than they may.

`--cpu_seconds=FILE` writes those of all tests, as JSON.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST, SHOWN = 3.0, 10  # CPU seconds of a test, with its fixtures and processes; lines at the end
STARTED = pytest.StashKey[float]()
_found: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu_seconds", metavar="FILE", type=Path, help="write all tests' CPU seconds to this file")


def _now() -> float:
    """Of this process, all its threads, and the processes that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[STARTED] = _now()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    finally:  # workers send a report with its properties to the process that writes the summary
        item.user_properties.append(("cpu_seconds", _now() - item.stash[STARTED]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        _found[report.nodeid] = float(dict(report.user_properties).get("cpu_seconds", 0.0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if file := terminalreporter.config.getoption("cpu_seconds"):
        file.write_text(json.dumps(_found, indent=1, sort_keys=True) + "\n")
    dear = [name for name in sorted(_found, key=_found.__getitem__, reverse=True) if _found[name] > MOST]
    if not dear:
        return
    total = sum(_found.values())
    terminalreporter.section(f"{total:,.0f} CPU seconds; {len(dear)} tests of {len(_found):,} took over {MOST:.0f}")
    for name in dear[:SHOWN]:
        terminalreporter.write_line(f"{_found[name]:6.1f}  {name}")
