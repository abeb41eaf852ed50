"""`python -m infer.chat`: see `streamjax.commands.chat`."""

import sys

from streamjax.commands.chat import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
