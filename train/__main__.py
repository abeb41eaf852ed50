"""`python -m train`: see `streamjax.commands.train`."""

from absl import app

from streamjax.commands.train import main, parse

if __name__ == "__main__":
    app.run(main, flags_parser=parse)
