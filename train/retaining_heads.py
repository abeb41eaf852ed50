"""`python -m train.retaining_heads`: see `streamjax.commands.retaining_heads`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("retaining_heads"))
