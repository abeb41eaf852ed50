"""`python -m infer.serve`: see `streamjax.commands.serve`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("serve"))
