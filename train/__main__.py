"""Train a model: `python -m train --config=configs/<name>.py --workdir=DIR`."""

import logging
import runpy
import sys

from absl import app, flags

from streamjax.training.loop import RunStopped, train

_CONFIG = flags.DEFINE_string("config", None, "The experiment: a Python file with get_config().", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; started again, it continues.", required=True)


def main(_: list[str]) -> None:
    config = runpy.run_path(_CONFIG.value)["get_config"]()
    try:
        train(config, _WORKDIR.value)
    except (ValueError, RunStopped) as stopped:
        logging.getLogger("absl").debug("stopped", exc_info=True)
        print(f"train: {stopped}", file=sys.stderr)
        sys.exit(getattr(stopped, "exit_code", 1))


if __name__ == "__main__":
    app.run(main)
