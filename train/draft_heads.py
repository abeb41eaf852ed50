"""`python -m train.draft_heads`: see `streamjax.commands.trained_parts.draft_heads`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("trained_parts.draft_heads"))
