"""`python -m infer.stream`: see `streamjax.commands.stream`."""

import sys

from streamjax.commands.stream import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
