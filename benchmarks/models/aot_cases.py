"""The command line of scripts that compile cases ahead of time, one in a process, and keep what they find."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import aot
from benchmarks.reporting import machine

# The environment of a case's process, by the case's name and a folder that is there while it runs.
Environment = Callable[[str, str], dict[str, str]]
# Figures from what a case's process printed, its scheduled program and bytes by the name of a memory.
Reader = Callable[[dict[str, Any], str, dict[str, int]], dict[str, Any]]


def run_case(module: str, name: str, environment: Environment) -> dict[str, Any]:
    """Compile one case in a fresh process and return its figures.

    Raises:
      RuntimeError: the compile failed; the message is the process's last line.
    """
    command = [sys.executable, "-m", module, "--child", name]
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.run(command, cwd=aot.ROOT, env=environment(name, folder), capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{name}: {child.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def run_until_assigned(module: str, name: str, environment: Environment, read_case: Reader) -> dict[str, Any]:
    """The figures of a case whose process is ended once the compiler has placed its buffers.

    Of a program that is larger than the chip's memory, `does_not_fit` has the bytes that it wants.

    Raises:
      RuntimeError: the compile failed before; the message is the process's last line.
    """
    command = [sys.executable, "-m", module, "--child", name]
    ended = aot.end_when_assigned(command, lambda folder: environment(name, folder))
    if ended.found is not None:
        return read_case(json.loads(ended.printed[-1]), *ended.found)
    if (ended.used is None and ended.beside is None) or not ended.printed:
        raise RuntimeError(f"{name}: {ended.errors.strip().splitlines()[-1]}")
    printed = json.loads(ended.printed[-1])
    beside = printed.get("weights", 0) + printed["state"] + (ended.beside or 0)
    return {**printed, "does_not_fit": beside if ended.used is None else ended.used}


def run(
    module: str,
    description: str | None,
    cases: Mapping[str, Any],
    output: Path,
    *,
    compile_case: Callable[[Any], dict[str, Any]],
    write_page: Callable[[dict[str, Any]], None],
    environment: Environment,
    read_case: Reader | None = None,
) -> None:
    """Compile the cases that the command line names, or write the page of those that were compiled.

    Args:
      module: the script's, by which its processes start.
      description: its docstring.
      cases: what there is to compile, by name.
      output: the file of figures; those of other cases stay.
      compile_case: compiles one, in this process, and returns its figures. With `read_case` it prints what it knows
        before it compiles, as a line of JSON, by `aot.compile_until_assigned`, and is ended there.
      read_case: figures from what a case printed, its scheduled program and the bytes of each memory.
      write_page: writes the tables of docs/sharding.md from the figures.
      environment: of a case's process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=cases, default=list(cases))
    parser.add_argument("--missing", action="store_true", help="leave out cases whose figures are there")
    parser.add_argument("--page", action="store_true", help="write the tables of docs/sharding.md")
    parser.add_argument("--child", choices=cases, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        figures = compile_case(cases[arguments.child])
        if figures:  # of those that are not read from what the compiler wrote
            print(json.dumps(figures))
        return
    found = json.loads(output.read_text())["cases"] if arguments.page or output.exists() else {}
    if arguments.page:
        write_page(found)
        return
    failures = []
    for name in arguments.cases:
        if arguments.missing and name in found:
            continue
        try:
            if read_case is None:
                found[name] = run_case(module, name, environment)
            else:
                found[name] = run_until_assigned(module, name, environment, read_case)
        except RuntimeError as failure:
            failures.append(str(failure))
            print(failure, file=sys.stderr, flush=True)
            continue
        print(name, json.dumps(found[name]), flush=True)
        output.write_text(json.dumps({"machine": machine(), "cases": found}, indent=1) + "\n")
    if failures:
        raise SystemExit(f"{len(failures)} cases did not compile")
