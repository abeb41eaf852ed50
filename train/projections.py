"""`python -m train.projections`: see `streamjax.commands.cache_training.projections`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("cache_training.projections"))
