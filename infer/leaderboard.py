"""`python -m infer.leaderboard`: see `streamjax.commands.leaderboard`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("leaderboard"))
