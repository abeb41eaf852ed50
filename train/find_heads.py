"""`python -m train.find_heads`: see `streamjax.commands.find_heads`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("find_heads"))
