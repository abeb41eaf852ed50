"""`python -m train.side_network`: see `streamjax.commands.trained_parts.side_network`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("trained_parts.side_network"))
