"""`python -m infer.perplexity`: see `streamjax.commands.perplexity`."""

import sys

from streamjax.commands.perplexity import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
