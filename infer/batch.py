"""`python -m infer.batch`: see `streamjax.commands.batch`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("batch"))
