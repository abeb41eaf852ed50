"""`python -m infer.demo`: see `streamjax.commands.demo`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("demo"))
