"""A fault is brought back in a copy of the repository, where its tests run."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.faults.reverted import Fault

ROOT = Path(__file__).parents[2]
_FOLDERS = ["streamjax", "pallas_kernels", "tests", "docs", "configs", "infer", "train"]
# CPU seconds that tests may take, and that tests may which should loop: they start within 10.
_MOST, _OF_A_LOOP = 120, 40
# A test that ends in one of these has not met the fault, but an edit that does not fit the code.
_NO_FAULT = re.compile(r"^E +(?:Syntax|Name|Import|ModuleNotFound|Indentation)Error\b.*", re.MULTILINE)


class Outcome(NamedTuple):
    """Whether the fault was noticed, and a line about it."""

    noticed: bool
    said: str


def copied(root: Path) -> Path:
    """What tests need of the repository, in a new folder."""
    for name in _FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root / name)
    (root / "models").symlink_to(ROOT / "models")
    return root


def with_edits(fault: Fault, root: Path) -> dict[Path, str]:
    """The files of a fault, as they are with it.

    Raises:
      ValueError: what is to be replaced is not there once.
    """
    texts: dict[Path, str] = {}
    for edit in fault.edits:
        path = root / edit.file
        text = texts.get(path) or path.read_text(encoding="utf-8")
        if text.count(edit.old) != 1:
            raise ValueError(f"{edit.file} has {text.count(edit.old)} times, not once: {edit.old!r}")
        texts[path] = text.replace(edit.old, edit.new)
    return texts


def bring_back(fault: Fault, root: Path) -> Outcome:
    """Run a fault's tests on the copy at `root` while it has the fault."""
    texts = with_edits(fault, root)
    before = {path: (path.read_text(encoding="utf-8"), path.stat().st_mtime) for path in texts}
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = f"{sys.executable} -m pytest -x -p no:xdist --hypothesis-profile unshrunk {fault.tests}"

    seconds = _OF_A_LOOP if fault.ends == "loops" else _MOST

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))

    try:
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        done = subprocess.run(
            ["sh", "-c", f"exec {command}"], cwd=root, env=environment, preexec_fn=limit, capture_output=True, text=True
        )
    finally:
        for path, (text, modified) in before.items():
            path.write_text(text, encoding="utf-8")
            os.utime(path, (modified, modified))  # what was compiled of it before is true again
    return judge(fault, done.returncode, done.stdout + done.stderr)


def judge(fault: Fault, status: int, printed: str) -> Outcome:
    """What pytest's exit status and output say."""
    if wrong := _NO_FAULT.search(printed):
        return Outcome(False, f"the edit does not fit: {wrong[0][1:].strip()}")
    failed = re.findall(r"^FAILED (\S+)", printed, re.MULTILINE)
    if status == 1 and failed:
        reason = re.search(r"^E +(\S.*)", printed, re.MULTILINE)
        return Outcome(True, f"{failed[0].rpartition('::')[2]} fails" + (f" ({reason[1][:90]})" if reason else ""))
    if status in (-signal.SIGXCPU, -signal.SIGKILL) and fault.ends == "loops":
        return Outcome(True, f"still runs behind {_OF_A_LOOP} CPU seconds")
    if status in (-signal.SIGBUS, -signal.SIGSEGV) and fault.ends == "dies":
        return Outcome(True, f"ends by {signal.Signals(-status).name}")
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
    return Outcome(False, f"pytest ended with status {status}: {last}")
