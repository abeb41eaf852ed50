"""`python -m infer.stream`: see `streamjax.commands.stream`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("stream"))
