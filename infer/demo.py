"""`python -m infer.demo`: see `streamjax.commands.demo`."""

import sys

from streamjax.commands.demo import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
