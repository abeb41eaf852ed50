"""Train a model.

    python -m train --config=configs/tiny.py --workdir=runs/tiny

The same command again continues where the run stopped; SIGTERM and Ctrl-C save first. The workdir gets metrics.jsonl,
TensorBoard files, checkpoints, and at the end model/, which streamjax.load and transformers read.

Any field of the configuration can be changed:

    --config.steps=500 --config.optimizer.learning_rate=3e-4 --config.data.source='notes/**/*.txt'

--help lists the fields and what they hold, of the file that --config names. Start from a pretrained model with
--config.model=none --config.init_from=FOLDER --config.data.tokenizer=FOLDER.
"""

import difflib
import logging
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging

from streamjax.training import RunStopped, TrainConfig, apply_overrides, describe, train

_CONFIG = flags.DEFINE_string("config", None, "The experiment: a Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; a run that is there continues.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes: calls jax.distributed.initialize().")
_RESUME_FROM = flags.DEFINE_integer(
    "resume_from", None, "Go on from the checkpoint of this step, not from the newest; 0 begins again. Later "
    "checkpoints are moved to checkpoints_set_aside.", lower_bound=0,
)  # fmt: skip
_PREFIX = "--config."


def main(argv: list[str]) -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("streamjax").setLevel(logging.INFO)
    try:
        config = _config(argv[1:])
        if _WORKDIR.value is None:
            raise ValueError(f"--workdir is missing: give the run a folder, for instance --workdir=runs/{config.name}")
    except ValueError as error:
        _fail(error, 2)
    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "streamjax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache.expanduser()))
    try:
        train(config, _WORKDIR.value, resume_from=_RESUME_FROM.value)
    except RunStopped as stopped:
        _fail(stopped, stopped.exit_code)
    except (ValueError, OSError) as error:
        _fail(error, 1)
    print(f"train: done; the model is in {Path(_WORKDIR.value) / 'model'}")


def _config(overrides: list[str]) -> TrainConfig:
    """The configuration of the file, with the command line's changes."""
    if _CONFIG.value is None:
        raise ValueError("--config is missing: name an experiment, for instance --config=configs/tiny.py")
    path = Path(_CONFIG.value)
    if not path.is_file():
        known = [str(file) for file in sorted(Path("configs").glob("*.py"))]
        close = difflib.get_close_matches(f"configs/{path.stem}.py", known, n=1) or known
        raise ValueError(f"no file {path}" + (f"; there is {', '.join(close)}" if close else ""))
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise ValueError(f"{path} defines no get_config()")
    pairs = [override.removeprefix(_PREFIX).partition("=") for override in overrides]
    return apply_overrides(get_config(), [(name, text) for name, _, text in pairs])


def parse(argv: list[str]) -> list[str]:
    """absl's flags, with `--config.*` left over for `main`; `--help` shows this page and the fields."""
    overrides, others, wants_help = [], argv[:1], False
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument.startswith(_PREFIX):
            overrides.append(argument if "=" in argument else f"{argument}={next(arguments, '')}")
        elif argument in ("--help", "-h", "-help", "--helpshort", "--helpfull"):
            wants_help = True
        else:
            others.append(argument)
    try:
        rest = flags.FLAGS(others)
        if rest[1:]:
            raise ValueError(f"unexpected argument {rest[1]!r}; see --help")
        if wants_help:
            _help(overrides)
    except (flags.Error, ValueError) as error:
        _fail(error, 2)
    return [argv[0], *overrides]


def _help(overrides: list[str]) -> None:
    print(__doc__)
    for name in ("config", "workdir", "resume_from", "distributed"):
        print(f"  --{name}: {flags.FLAGS[name].help}")
    if _CONFIG.value is not None:
        print(f"\nFields, as {_CONFIG.value} sets them:")
        print("\n".join(f"  --{line}" for line in describe(_config(overrides))))
    sys.exit(0)


def _fail(error: Exception, code: int) -> NoReturn:
    print("train: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
