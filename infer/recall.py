"""`python -m infer.recall`: see `streamjax.commands.recall`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("recall"))
