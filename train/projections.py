"""`python -m train.projections`: see `streamjax.commands.projections`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("projections"))
