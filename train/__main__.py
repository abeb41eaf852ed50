"""`python -m train`: see `streamjax.commands.train`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("train"))
