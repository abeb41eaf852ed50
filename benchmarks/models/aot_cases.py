"""The command line of scripts that compile cases ahead of time, one in a process, and keep what they find."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import aot
from benchmarks.reporting import machine

# The environment of a case's process, by the case's name.
Environment = Callable[[str], dict[str, str]]
# Figures from what a case's process printed, its scheduled program and bytes by the name of a memory.
Reader = Callable[[dict[str, Any], str, dict[str, int]], dict[str, Any]]


def run_case(module: str, name: str, environment: Mapping[str, str], read_case: Reader) -> dict[str, Any]:
    """The figures of a case whose process is ended once the compiler has placed its buffers.

    Of a program that is larger than the chip's memory, `does_not_fit` has the bytes that it wants.

    Raises:
      RuntimeError: the compile failed before; the message is the process's last line.
    """
    command = [sys.executable, "-m", module, "--child", name]
    ended = aot.end_when_assigned(command, environment)
    printed = json.loads(ended.printed[-1]) if ended.printed else {}
    if ended.found is not None:
        return read_case(printed, *ended.found)
    wanted = aot.wanted_bytes(ended.errors, printed.get("weights", 0) + printed.get("state", 0))
    if wanted is None or not printed:
        raise RuntimeError(f"{name}: {ended.errors.strip().splitlines()[-1]}")
    return {**printed, "does_not_fit": wanted}


def run(
    module: str,
    description: str | None,
    cases: Mapping[str, Any],
    output: Path,
    *,
    compile_case: Callable[[Any], None],
    write_page: Callable[[dict[str, Any]], None],
    environment: Environment,
    read_case: Reader,
) -> None:
    """Compile the cases that the command line names, or write the page of those that were compiled.

    Args:
      module: the script's, by which its processes start.
      description: its docstring.
      cases: what there is to compile, by name.
      output: the file of figures; those of other cases stay.
      compile_case: prints what it knows of one, as a line of JSON, and compiles it in this process, which is ended
        where its buffers have their places (`aot.compile_until_assigned`).
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
        compile_case(cases[arguments.child])
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
            found[name] = run_case(module, name, environment(name), read_case)
        except RuntimeError as failure:
            failures.append(str(failure))
            print(failure, file=sys.stderr, flush=True)
            continue
        print(name, json.dumps(found[name]), flush=True)
        output.write_text(json.dumps({"machine": machine(), "cases": found}, indent=1) + "\n")
    if failures:
        raise SystemExit(f"{len(failures)} cases did not compile")
