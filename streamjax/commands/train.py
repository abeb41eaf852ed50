"""Train a model.

    python -m train --config=configs/tiny.py --workdir=runs/tiny
    python -m train --config=configs/stdlib_byte.py --workdir=runs/mine --config.optimizer.learning_rate=1e-3
    python -m train --config=configs/tiny.py --help

The same command again continues where the run stopped; SIGTERM, SIGHUP and Ctrl-C save first. The workdir gets
metrics.jsonl, TensorBoard files, checkpoints, and at the end model/, which streamjax.load and transformers read.

Any field of the configuration can be changed:

    --config.steps=500 --config.optimizer.learning_rate=3e-4 --config.data.source='notes/**/*.txt'

--help lists the fields and what they hold, of the file that --config names. Start from a pretrained model with
--config.model=none --config.init_from=FOLDER --config.data.tokenizer=FOLDER.
"""

from __future__ import annotations

import difflib
import logging
import runpy
import sys
from pathlib import Path

import jax
from absl import flags

from streamjax.checkpoints import user_path
from streamjax.commands.flags.checks import refuse_empty
from streamjax.commands.shell.runner import Stopped, complain, require_device, run_command
from streamjax.parallel.multiprocess import GO_ON, LOST, exit_without_others, join_processes
from streamjax.parallel.watching import Watch
from streamjax.training import RunStopped, TrainConfig, apply_overrides, describe, train

_PREFIX = "--config."
_SECONDS_TO_KNOW = 20.0  # which process is gone, when a collective has failed
Overrides = list[tuple[str, str]]


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "The experiment: a Python file with get_config().", flag_values=values)
    flags.DEFINE_string("workdir", None, "The run's folder; a run that is there continues.", flag_values=values)
    flags.DEFINE_integer(
        "resume_from", None, "Go on from the checkpoint of this step, not from the newest; 0 begins again. Later "
        "checkpoints are moved to checkpoints_set_aside.", lower_bound=0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "distributed", False, "One of several processes: calls jax.distributed.initialize().", flag_values=values
    )
    refuse_empty(values, "config", "workdir")


def split(argv: list[str]) -> tuple[list[str], Overrides]:
    """The arguments without `--config.FIELD=VALUE` or `--config.FIELD VALUE`, and these fields with their values."""
    others, overrides = argv[:1], []
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument.startswith(_PREFIX):
            name, equals, value = argument.removeprefix(_PREFIX).partition("=")
            overrides.append((name, value if equals else next(arguments, "")))
        else:
            others.append(argument)
    return others, overrides


def body(values: flags.FlagValues, overrides: Overrides) -> None:
    logging.getLogger("streamjax").setLevel(logging.INFO)
    try:
        config = read_config(values.config, overrides)
        if values.workdir is None:
            raise ValueError(f"--workdir is missing: give the run a folder, for instance --workdir=runs/{config.name}")
    except ValueError as error:
        raise flags.Error(str(error)) from error
    if values.distributed:
        _join_processes()
    require_device()
    workdir, watch = user_path(values.workdir), None
    if jax.process_count() > 1:
        watch = Watch(_end_without)
    try:
        train(config, workdir, resume_from=values.resume_from)
    except RunStopped as stopped:
        if watch is not None:
            watch.leave()
        raise Stopped(stopped.exit_code, str(stopped)) from stopped
    except Exception as error:
        if watch is None:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            watch.wait(_SECONDS_TO_KNOW)  # who is gone; then this process has ended
        watch.leave(failed=True)
        if values.traceback:
            raise
        complain(ValueError(f"{LOST} ({error})") if isinstance(error, jax.errors.JaxRuntimeError) else error)
        exit_without_others(1)
    if watch is not None:
        watch.leave()
    print(f"done; the model is in {workdir / 'model'}")


def _end_without(who: str) -> None:
    """End this process, which can do nothing without the one that is gone."""
    complain(ValueError(f"{who}; {GO_ON}"))
    exit_without_others(1)


def read_config(name: str | None, overrides: Overrides) -> TrainConfig:
    """The configuration of a file, with the command line's changes.

    Raises:
      ValueError: no such file; a file that fails, or has no get_config(); an unknown field, or a wrong value.
    """
    if name is None:
        raise ValueError("--config is missing: name an experiment, for instance --config=configs/tiny.py")
    path = user_path(name)
    if not path.is_file():
        known = [str(file) for file in sorted(Path("configs").glob("*.py"))]
        close = difflib.get_close_matches(f"configs/{path.stem}.py", known, n=1) or known
        there = f"there is {', '.join(close)}" if close else "write a Python file with get_config() (docs/training.md)"
        raise ValueError(f"no file {path}; {there}")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise ValueError("it defines no get_config()")
        config = get_config()
    except (Exception, SystemExit) as error:  # a user's own code
        raise ValueError(f"{path}{_place(error, path)}: {_kind(error)}{error}") from error
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path}: get_config() returns {type(config).__name__}, and a TrainConfig is needed")
    return apply_overrides(config, overrides)


def _place(error: BaseException, path: Path) -> str:
    """Where in the file it failed, as far as that is known."""
    line, trace = error.lineno if isinstance(error, SyntaxError) else None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f", line {line}"


def _kind(error: BaseException) -> str:
    return "" if isinstance(error, ValueError) else f"{type(error).__name__}: "


def _join_processes() -> None:
    try:
        join_processes()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: {error} It is for the processes of a TPU pod, Slurm or another cluster that JAX knows"
        ) from error


def _fields(values: flags.FlagValues, overrides: Overrides) -> str:
    """For --help: the fields of the configuration that is named."""
    if values.config is None:
        return ""
    try:
        lines = describe(read_config(values.config, overrides))
    except ValueError as error:
        raise flags.Error(str(error)) from error
    return "\n".join([f"\n\nFields, as {values.config} sets them:", *(f"  --{line}" for line in lines)])


def main(argv: list[str] | None = None) -> int:
    others, overrides = split(list(sys.argv if argv is None else argv))
    return run_command(
        __doc__,
        [define],
        lambda values: body(values, overrides),
        others,
        extend_help=lambda values: _fields(values, overrides),
    )
