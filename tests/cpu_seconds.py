"""What tests take: at the end of a run, its CPU seconds, the memory of its largest worker, and the dearest tests.

`--cpu_seconds=FILE` writes those of all tests, as JSON.
"""

import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST, SHOWN = 3.0, 10  # CPU seconds of a test, with its fixtures and processes; lines at the end
STARTED = pytest.StashKey[float]()
_found: dict[str, float] = {}
_peaks: list[float] = [0.0]


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
        item.user_properties.append(("peak_bytes", _peak_bytes()))


def _peak_bytes() -> int:
    """The most that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        taken = dict(report.user_properties)
        _found[report.nodeid] = float(taken.get("cpu_seconds", 0.0))
        _peaks[0] = max(_peaks[0], float(taken.get("peak_bytes", 0.0)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if file := terminalreporter.config.getoption("cpu_seconds"):
        file.write_text(json.dumps(_found, indent=1, sort_keys=True) + "\n")
    dear = [name for name in sorted(_found, key=_found.__getitem__, reverse=True) if _found[name] > MOST]
    if not dear:
        return
    total, peak = sum(_found.values()), _peaks[0] / 1e9
    terminalreporter.section(
        f"{total:,.0f} CPU seconds, {peak:.1f} GB in a worker; {len(dear)} of {len(_found):,} tests over {MOST:.0f}"
    )
    for name in dear[:SHOWN]:
        terminalreporter.write_line(f"{_found[name]:6.1f}  {name}")
