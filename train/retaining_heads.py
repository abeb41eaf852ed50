"""`python -m train.retaining_heads`: see `streamjax.commands.cache_training.retaining_heads`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("cache_training.retaining_heads"))
