"""`python -m train.convolutions`: see `streamjax.commands.cache_training.convolutions`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("cache_training.convolutions"))
