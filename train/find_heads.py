"""`python -m train.find_heads`: see `streamjax.commands.find_heads`."""

import sys

from streamjax.commands.find_heads import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
