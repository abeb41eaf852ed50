"""`python -m infer.chat`: see `streamjax.commands.chat`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("chat"))
