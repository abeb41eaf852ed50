"""`python -m infer.recall`: see `streamjax.commands.recall`."""

import sys

from streamjax.commands.recall import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
