"""`python -m train.measure_budget`: see `streamjax.commands.measure_budget`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("measure_budget"))
