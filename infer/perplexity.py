"""`python -m infer.perplexity`: see `streamjax.commands.perplexity`."""

import sys

from streamjax.commands.shell.launch import launch

if __name__ == "__main__":
    sys.exit(launch("perplexity"))
